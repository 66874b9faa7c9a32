//! The subnet file: what the daemon tells Docker and other programs of its host (`/run/flannel/subnet.env`).
//!
//! ```text
//! FLANNEL_NETWORK=10.5.0.0/16
//! FLANNEL_SUBNET=10.5.34.1/24
//! FLANNEL_MTU=1472
//! FLANNEL_IPMASQ=false
//! ```
//! A dual-stack network adds `FLANNEL_IPV6_NETWORK` and `FLANNEL_IPV6_SUBNET` before the MTU. A subnet is written with
//! the address that the host's bridge takes, its first: that is what `docker --bip` wants.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{files, network::Block};

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetFile {
    /// This host's part of the overlay, IPv4.
    pub ipv4: Option<Share<Ipv4Net>>,
    /// This host's part of the overlay, IPv6.
    pub ipv6: Option<Share<Ipv6Net>>,
    /// The largest IP packet that fits the overlay, in bytes.
    pub mtu: u32,
    /// Whether the daemon masquerades what leaves the overlay.
    pub ip_masq: bool,
}

/// A host's share of one address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share<N> {
    /// The whole overlay.
    pub network: N,
    /// This host's subnet.
    pub subnet: N,
}

/// What an earlier run left in the file; each line by itself, since people write such files, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Previous {
    /// `FLANNEL_NETWORK`
    pub network: Option<Ipv4Net>,
    /// `FLANNEL_SUBNET`, without the host's address
    pub subnet: Option<Ipv4Net>,
    /// `FLANNEL_IPV6_NETWORK`
    pub ipv6_network: Option<Ipv6Net>,
    /// `FLANNEL_IPV6_SUBNET`, without the host's address
    pub ipv6_subnet: Option<Ipv6Net>,
}

impl SubnetFile {
    /// The file's text.
    pub fn render(&self) -> String {
        let mut lines = Vec::new();
        if let Some(Share { network, subnet }) = self.ipv4 {
            lines.push(format!("FLANNEL_NETWORK={network}"));
            lines.push(format!("FLANNEL_SUBNET={}", with_bridge_address(subnet.into())));
        }
        if let Some(Share { network, subnet }) = self.ipv6 {
            lines.push(format!("FLANNEL_IPV6_NETWORK={network}"));
            lines.push(format!("FLANNEL_IPV6_SUBNET={}", with_bridge_address(subnet.into())));
        }
        lines.push(format!("FLANNEL_MTU={}", self.mtu));
        lines.push(format!("FLANNEL_IPMASQ={}", self.ip_masq));
        lines.join("\n") + "\n"
    }

    /// Puts the file at `path`, making its directory. A reader sees the old text or the new one, never a part, also after
    /// a power failure.
    ///
    /// # Errors
    /// Which step failed, on what.
    pub fn write_atomically(&self, path: &Path) -> Result<(), WriteError> {
        // Programs of other users read it.
        files::replace(path, self.render().as_bytes(), 0o644).map_err(WriteError)
    }

    /// Whether the file at `path` says exactly this.
    pub fn is_at(&self, path: &Path) -> bool {
        fs::read(path).is_ok_and(|text| text == self.render().as_bytes())
    }
}

/// The subnet with its first host address, which the host's bridge takes.
fn with_bridge_address(subnet: IpNet) -> String {
    let first: IpAddr = match subnet.network() {
        IpAddr::V4(network) => Ipv4Addr::from_bits(network.to_bits() | 1).into(),
        IpAddr::V6(network) => Ipv6Addr::from_bits(network.to_bits() | 1).into(),
    };
    // No network hands out a block of one address, but people write such files; there it is the only one.
    let address = first.min(subnet.broadcast());
    format!("{address}/{}", subnet.prefix_len())
}

impl Previous {
    /// Reads what can be read: a shell's quotes, `export`, comments, other variables and broken lines do no harm, and the
    /// last of several equal names counts.
    pub fn parse(text: &str) -> Self {
        let mut previous = Previous::default();
        for (name, value) in variables(text) {
            match name {
                "FLANNEL_NETWORK" => previous.network = block(value),
                "FLANNEL_SUBNET" => previous.subnet = block(value),
                "FLANNEL_IPV6_NETWORK" => previous.ipv6_network = block(value),
                "FLANNEL_IPV6_SUBNET" => previous.ipv6_subnet = block(value),
                _ => {}
            }
        }
        previous
    }

    /// Reads the file at `path`; nothing is known when there is none.
    ///
    /// # Errors
    /// It is there and cannot be read.
    pub fn read(path: &Path) -> io::Result<Self> {
        match fs::read(path) {
            Ok(bytes) => Ok(Previous::parse(&String::from_utf8_lossy(&bytes))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Previous::default()),
            Err(error) => Err(error),
        }
    }
}

/// The variables that a file of them sets, in its order, each with its value; lines that set none are left out.
pub(crate) fn variables(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        let line = line.trim();
        let (name, value) = line.strip_prefix("export ").unwrap_or(line).split_once('=')?;
        Some((name.trim(), unquoted(value.trim())))
    })
}

fn unquoted(value: &str) -> &str {
    let inside = |quote| value.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
    inside('"').or_else(|| inside('\'')).unwrap_or(value)
}

fn block<N: Block>(value: &str) -> Option<N> {
    let block: N = value.parse().ok()?;
    Some(N::around(block.first(), block.length()))
}

/// The subnet file could not be written.
#[derive(Debug, thiserror::Error)]
#[error("{0}; check that the daemon may write there, or give another place with --subnet-file")]
pub struct WriteError(files::ReplaceError);

#[cfg(test)]
mod tests {
    use std::{env, fs::File, os::unix::fs::PermissionsExt, path::PathBuf, process};

    use proptest::prelude::*;

    use super::*;

    fn file() -> SubnetFile {
        let ipv4 = Share {
            network: "10.5.0.0/16".parse().unwrap(),
            subnet: "10.5.34.0/24".parse().unwrap(),
        };
        SubnetFile {
            ipv4: Some(ipv4),
            ipv6: None,
            mtu: 1472,
            ip_masq: false,
        }
    }

    /// A directory of this test's own, removed in the end.
    struct Dir(PathBuf);

    impl Dir {
        fn new(test: &str) -> Self {
            let path = env::temp_dir().join(format!("flannel-subnet-file-{test}-{}", process::id()));
            fs::create_dir_all(&path).unwrap();
            Dir(path)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_text_is_the_originals() {
        let text = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n";
        assert_eq!(file().render(), text);
    }

    #[test]
    fn a_dual_stack_network_adds_its_lines_before_the_mtu() {
        let ipv6 = Share {
            network: "fd00:12::/48".parse().unwrap(),
            subnet: "fd00:12:0:7::/64".parse().unwrap(),
        };
        let text = SubnetFile {
            ipv6: Some(ipv6),
            mtu: 1450,
            ip_masq: true,
            ..file()
        }
        .render();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "FLANNEL_NETWORK=10.5.0.0/16",
                "FLANNEL_SUBNET=10.5.34.1/24",
                "FLANNEL_IPV6_NETWORK=fd00:12::/48",
                "FLANNEL_IPV6_SUBNET=fd00:12:0:7::1/64",
                "FLANNEL_MTU=1450",
                "FLANNEL_IPMASQ=true",
            ]
        );
    }

    #[test]
    fn files_that_people_write_are_read() {
        let text = "# mine\r\nexport FLANNEL_SUBNET=\"10.5.9.1/24\"\r\n\nFLANNEL_NETWORK = '10.5.0.0/16' \nFLANNEL_MTU=x\nnonsense\n\
            FLANNEL_IPV6_SUBNET=fd00::1/64\n#FLANNEL_SUBNET=10.5.1.1/24\nFLANNEL_IPV6_NETWORK=oops\n";
        let previous = Previous::parse(text);
        assert_eq!(previous.subnet, Some("10.5.9.0/24".parse().unwrap()));
        assert_eq!(previous.network, Some("10.5.0.0/16".parse().unwrap()));
        assert_eq!(previous.ipv6_subnet, Some("fd00::/64".parse().unwrap()));
        assert_eq!(previous.ipv6_network, None);
        assert_eq!(Previous::parse(""), Previous::default());
    }

    #[test]
    fn a_file_is_written_into_a_new_directory_and_replaced_whole() {
        let dir = Dir::new("replace");
        let path = dir.0.join("run/flannel/subnet.env");
        assert_eq!(Previous::read(&path).unwrap(), Previous::default());
        file().write_atomically(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), file().render());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);

        let old = File::open(&path).unwrap();
        SubnetFile { mtu: 9000, ..file() }.write_atomically(&path).unwrap();
        assert_eq!(io::read_to_string(old).unwrap(), file().render());
        assert!(fs::read_to_string(&path).unwrap().contains("FLANNEL_MTU=9000"));
        assert_eq!(
            Previous::read(&path).unwrap().subnet,
            file().ipv4.map(|share| share.subnet)
        );
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_names_the_path_and_the_remedy_and_leaves_nothing() {
        let dir = Dir::new("failure");
        let path = dir.0.join("subnet.env");
        fs::create_dir(&path).unwrap();
        let message = file().write_atomically(&path).unwrap_err().to_string();
        assert!(
            message.contains(&format!("cannot replace {}", path.display())),
            "{message}"
        );
        assert!(message.contains("--subnet-file"), "{message}");
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 1);

        let below_a_file = dir.0.join("file/subnet.env");
        fs::write(dir.0.join("file"), "").unwrap();
        let message = file().write_atomically(&below_a_file).unwrap_err().to_string();
        assert!(message.contains("make the directory"), "{message}");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(address: u32, len in 0u8..=32, v6 in prop::option::of(any::<u128>()), mtu: u32) {
            let subnet = Ipv4Net::around(address.into(), len);
            let network = Ipv4Net::around(address.into(), len / 2);
            let ipv6 = v6.map(|v6| Share { network: Ipv6Net::around(v6, 48), subnet: Ipv6Net::around(v6, 64) });
            let file = SubnetFile { ipv4: Some(Share { network, subnet }), ipv6, mtu, ip_masq: mtu % 2 == 0 };
            let expected = Previous {
                network: Some(network),
                subnet: Some(subnet),
                ipv6_network: ipv6.map(|share| share.network),
                ipv6_subnet: ipv6.map(|share| share.subnet),
            };
            prop_assert_eq!(Previous::parse(&file.render()), expected);
        }
    }
}
