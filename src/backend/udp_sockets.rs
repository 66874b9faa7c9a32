//! The tunnel's sockets, bound anew or as an earlier process has left them.

use std::{
    collections::BTreeMap,
    io,
    net::{SocketAddr, UdpSocket},
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

use tracing::info;

use super::Error;
use crate::{engine::Sockets, kernel::external::External, network, sys::udp};

/// How long, and how often, a port that is taken is tried again: the kernel closes the files of a killed daemon that has used
/// io_uring some 20 ms after its end ([`crate::sys::uring`]), on a busy machine later.
const PORT_PATIENCE: Duration = Duration::from_millis(500);
const PORT_RETRY: Duration = Duration::from_millis(10);

/// For each worker the tunnel's socket and, with more than one source port, one for each of the others. All workers have the same
/// ports, so that a flow keeps its own whichever worker carries it. Those of `left` that fit are among them; the others are closed.
pub(super) fn bind_on(
    external: &External,
    configuration: &network::Udp,
    workers: usize,
    left: Vec<OwnedFd>,
) -> Result<Vec<Sockets>, Error> {
    let address = SocketAddr::new(external.address.into(), configuration.port);
    bind(address, workers, configuration.source_ports.get(), left).map_err(|source| Error::Bind {
        address,
        hint: match source.kind() {
            io::ErrorKind::AddrInUse => {
                "another process has the port, perhaps another flanneld; stop it, or give this network another Backend.Port"
            }
            io::ErrorKind::AddrNotAvailable => "this host does not have the address any more",
            _ => "the system refuses",
        },
        source,
    })
}

fn bind(address: SocketAddr, workers: usize, source_ports: u8, left: Vec<OwnedFd>) -> io::Result<Vec<Sockets>> {
    let (mut tunnel, mut sources) = sorted(left, address);
    tunnel.truncate(workers);
    let begun = Instant::now();
    loop {
        match udp::grow_group(&mut tunnel, address, workers) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && begun.elapsed() < PORT_PATIENCE => {
                thread::sleep(PORT_RETRY);
            }
            bound => break bound?,
        }
    }
    // By their numbers, so that a flow has its own port after a restart too, in whichever order a supervisor hands them over.
    let mut by_port = BTreeMap::new();
    for _ in 1..source_ports {
        let mut source = sources.pop_first().map_or_else(Vec::new, |(_, group)| group);
        source.truncate(workers);
        udp::grow_source(&mut source, address.ip(), workers)?;
        if let Some(socket) = source.first() {
            by_port.insert(socket.local_addr()?.port(), source);
        }
    }
    let mut sockets: Vec<Vec<UdpSocket>> = tunnel.into_iter().map(|socket| vec![socket]).collect();
    for source in by_port.into_values() {
        sockets
            .iter_mut()
            .zip(source)
            .for_each(|(of_worker, socket)| of_worker.push(socket));
    }
    Ok(sockets.into_iter().map(Sockets::from).collect())
}

/// Those of the tunnel's port on this address, and those of each other port on it; the others are closed.
fn sorted(left: Vec<OwnedFd>, tunnel: SocketAddr) -> (Vec<UdpSocket>, BTreeMap<u16, Vec<UdpSocket>>) {
    let mut by_port: BTreeMap<u16, Vec<UdpSocket>> = BTreeMap::new();
    let mut misfits = 0;
    for descriptor in left {
        let socket = udp::adopt(descriptor).and_then(|socket| Ok((socket.local_addr()?, socket)));
        match socket {
            Ok((address, socket)) if address.ip() == tunnel.ip() => {
                by_port.entry(address.port()).or_default().push(socket)
            }
            _ => misfits += 1,
        }
    }
    let of_tunnel = by_port.remove(&tunnel.port());
    if misfits > 0 || (of_tunnel.is_none() && !by_port.is_empty()) {
        info!("closing UDP sockets of the run before, which are not on {tunnel}: what they hold is lost");
    }
    match of_tunnel {
        Some(sockets) => (sockets, by_port),
        // The port before is one that datagrams still come to: it is not to send from.
        None => (Vec::new(), BTreeMap::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a port of the kernel's choice, which all of `count` workers have.
    fn bound(count: usize, source_ports: u8) -> (SocketAddr, Vec<Sockets>) {
        let sockets = bind("127.0.0.1:0".parse().unwrap(), count, source_ports, Vec::new()).unwrap();
        (sockets[0][0].local_addr().unwrap(), sockets)
    }

    fn ports(sockets: &[Sockets]) -> Vec<Vec<u16>> {
        let port = |socket: &UdpSocket| socket.local_addr().unwrap().port();
        sockets
            .iter()
            .map(|sockets| sockets.iter().map(port).collect())
            .collect()
    }

    fn copies(sockets: &[Sockets]) -> Vec<OwnedFd> {
        let all = sockets.iter().flat_map(|sockets| sockets.iter());
        all.map(|socket| socket.try_clone().unwrap().into()).collect()
    }

    #[test]
    fn what_an_earlier_process_has_left_is_used_with_all_that_it_holds() {
        let (address, first) = bound(2, 3);
        let before = ports(&first);
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.send_to(b"kept", address).unwrap();
        let left = copies(&first);
        drop(first);
        let again = bind(address, 2, 3, left).unwrap();
        assert_eq!(ports(&again), before);
        let held = again.iter().filter(|sockets| sockets[0].recv(&mut [0; 8]).is_ok());
        assert_eq!(held.count(), 1);
    }

    #[test]
    fn more_workers_and_ports_are_added_and_fewer_closed() {
        let (address, first) = bound(2, 2);
        let more = bind(address, 3, 3, copies(&first)).unwrap();
        let numbers = ports(&more);
        assert_eq!(numbers.len(), 3);
        assert!(numbers.iter().all(|of_worker| *of_worker == numbers[0]));
        assert_eq!(numbers[0][0], address.port());
        assert!(numbers[0].contains(&ports(&first)[0][1]));
        drop(first);
        let left = copies(&more);
        drop(more);
        let fewer = bind(address, 1, 1, left).unwrap();
        assert_eq!(ports(&fewer), [[address.port()]]);
        assert_eq!(
            udp::bind_group(address, 1).unwrap_err().kind(),
            io::ErrorKind::AddrInUse
        );
    }

    #[test]
    fn what_is_on_another_port_or_no_udp_socket_is_closed() {
        let (address, first) = bound(1, 2);
        let mut left = copies(&first);
        left.push(std::fs::File::open("/dev/null").unwrap().into());
        drop(first);
        let other = bind("127.0.0.1:0".parse().unwrap(), 1, 2, left).unwrap();
        assert_ne!(ports(&other)[0][0], address.port());
        // Nothing of it is open any more.
        udp::bind_group(address, 1).unwrap();
    }
}
