//! Features of network devices: ethtool's ioctl (linux/ethtool.h).

use std::{io, os::fd::AsRawFd};

use socket2::{Domain, Socket, Type};

/// "Get tx-checksumming" (`ETHTOOL_GTXCSUM`).
const GET_TX_CHECKSUM: u32 = 0x16;

/// "Set tx-checksumming" (`ETHTOOL_STXCSUM`): all of the device's `tx-checksum-*` features.
const SET_TX_CHECKSUM: u32 = 0x17;

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Whether the kernel leaves checksums of packets that are sent on the device `name` to the device; on a VXLAN device, which
/// computes none, to whatever the packets leave by in the end.
///
/// # Errors
/// `ENODEV` when there is no such device in the network namespace of the calling thread.
pub fn tx_checksum(name: &str) -> io::Result<bool> {
    let mut value = Value {
        command: GET_TX_CHECKSUM,
        data: 0,
    };
    call(name, &mut value)?;
    Ok(value.data != 0)
}

/// Switches that on or off (`ethtool -K <name> tx-checksum-ip-generic off`).
///
/// # Errors
/// As [`tx_checksum`]; `EPERM` without `CAP_NET_ADMIN`; `EOPNOTSUPP` when the device cannot.
pub fn set_tx_checksum(name: &str, on: bool) -> io::Result<()> {
    let mut value = Value {
        command: SET_TX_CHECKSUM,
        data: on.into(),
    };
    call(name, &mut value)
}

fn call(name: &str, value: &mut Value) -> io::Result<()> {
    // Any socket leads to the devices of its network namespace (netdevice(7)).
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    // SAFETY: `ifreq` is plain data, for which all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0: no device has a longer name.
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut *value).cast();
    // SAFETY: SIOCETHTOOL reads one `ifreq` and reads and writes the `ethtool_value` that it points to, which both commands
    // take; both live here through the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// linux/sockios.h
const SIOCETHTOOL: libc::Ioctl = 0x8946;
