//! The original on a host, imitated by hand: its lease put with `etcdctl`, its kernel programmed with `ip` and `bridge`.

use super::{Overlay, etcd::EtcdServer, inside, plain_peer::free_subnet, programmed::by_hand};
use etcd_client::{Client, Txn, TxnOp};
use flannel::lab::{Container, Host, HostOptions, Lab, Namespace, SubnetEnv};
use ipnet::Ipv4Net;
use std::net::Ipv4Addr;

/// What the original's vxlan leaves of an underlay of 1,500 bytes.
const VXLAN_MTU: u32 = 1_450;

/// Where the leases are.
const SUBNETS: &str = "/coreos.com/network/subnets/";

/// The address of a host of the original that is only a lease: in the hosts' network, far above those of the lab.
pub(crate) fn public_ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 77, last)
}

/// Its subnet, 10.5.`third`.0/24.
pub(crate) fn other_subnet(third: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(10, 5, third, 0), 24)
}

/// The lease's key in etcd.
fn key(subnet: Ipv4Net) -> String {
    format!("{SUBNETS}{}", subnet.trunc().to_string().replace('/', "-"))
}

/// Writes a lease.
pub(crate) fn put_lease(server: &EtcdServer, subnet: Ipv4Net, value: &str) {
    server.etcdctl(&["put", &key(subnet), value]);
}

/// Writes thousands of leases, as many to a transaction as etcd takes.
pub(crate) fn put_leases(lab: &Lab, server: &EtcdServer, leases: impl Iterator<Item = (Ipv4Net, String)> + Send) {
    let puts: Vec<TxnOp> = leases
        .map(|(subnet, value)| TxnOp::put(key(subnet), value, None))
        .collect();
    inside(lab.switch(), || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut client = Client::connect([server.url()], None).await.unwrap();
            for chunk in puts.chunks(128) {
                client.txn(Txn::new().and_then(chunk)).await.unwrap();
            }
        });
    });
}

/// Removes a lease.
pub(crate) fn delete_lease(server: &EtcdServer, subnet: Ipv4Net) {
    server.etcdctl(&["del", &key(subnet)]);
}

/// A lease's value, byte for byte.
pub(crate) fn lease(server: &EtcdServer, subnet: Ipv4Net) -> String {
    let value = server.etcdctl(&["get", "--print-value-only", &key(subnet)]);
    // etcdctl ends it with a line break of its own.
    value.strip_suffix('\n').unwrap_or(&value).to_owned()
}

/// A vxlan lease as the original writes it, with VNI 1.
pub(crate) fn vxlan_lease(public_ip: Ipv4Addr, mac: &str) -> String {
    format!(
        r#"{{"PublicIP":"{public_ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
    )
}

/// A host-gw lease as the original writes it.
pub(crate) fn host_gw_lease(public_ip: Ipv4Addr) -> String {
    format!(r#"{{"PublicIP":"{public_ip}","PublicIPv6":null,"BackendType":"host-gw"}}"#)
}

/// Makes `flannel.1` as the original does.
pub(crate) fn make_device(ns: &Namespace, local: Ipv4Addr, subnet: Ipv4Net, mac: &str) {
    for line in [
        format!(
            "ip link add flannel.1 address {mac} mtu {VXLAN_MTU} type vxlan id 1 local {local} dev eth0 dstport 8472 \
             nolearning"
        ),
        format!("ip address add {}/32 dev flannel.1", subnet.network()),
        "ip link set flannel.1 up".to_owned(),
    ] {
        by_hand(ns, &line);
    }
}

/// Programs a peer as the original does; its entries bear no protocol number.
pub(crate) fn add_tunnel(ns: &Namespace, subnet: Ipv4Net, mac: &str, public_ip: Ipv4Addr) {
    let gateway = subnet.network();
    for line in [
        format!("ip neigh replace {gateway} lladdr {mac} dev flannel.1 nud permanent"),
        format!("bridge fdb replace {mac} dev flannel.1 dst {public_ip} self permanent"),
        format!("ip route replace {subnet} via {gateway} dev flannel.1 onlink"),
    ] {
        by_hand(ns, &line);
    }
}

/// Routes to a peer as the original's host-gw does.
pub(crate) fn add_route(ns: &Namespace, subnet: Ipv4Net, public_ip: Ipv4Addr) {
    by_hand(ns, &format!("ip route replace {subnet} via {public_ip} dev eth0"));
}

/// A host that runs the original.
pub(crate) struct Original {
    pub(crate) container: Container,
    pub(crate) subnet: Ipv4Net,
    /// Of its vxlan device.
    pub(crate) mac: &'static str,
    pub(crate) host: Host,
}

impl Original {
    /// Any that nobody else in a test has.
    const MAC: &str = "d2:72:c5:90:ff:8c";

    /// Joins the overlay's `vxlan` network: it knows all the hosts that are there, and they learn of it.
    pub(crate) fn vxlan(overlay: &mut Overlay, server: &EtcdServer, options: &HostOptions) -> Original {
        let original = Original::attach(overlay, options, VXLAN_MTU);
        make_device(original.host.ns(), original.host.ip(), original.subnet, Self::MAC);
        for (host, daemon) in overlay.hosts.iter().zip(&overlay.daemons) {
            let mac = super::programmed::mac(host.ns(), "flannel.1");
            add_tunnel(original.host.ns(), daemon.subnet().subnet.trunc(), &mac, host.ip());
        }
        put_lease(server, original.subnet, &vxlan_lease(original.host.ip(), Self::MAC));
        original
    }

    /// The same in a `host-gw` network.
    pub(crate) fn host_gw(overlay: &mut Overlay, server: &EtcdServer) -> Original {
        let original = Original::attach(overlay, &HostOptions::default(), 1_500);
        for (host, daemon) in overlay.hosts.iter().zip(&overlay.daemons) {
            add_route(original.host.ns(), daemon.subnet().subnet.trunc(), host.ip());
        }
        put_lease(server, original.subnet, &host_gw_lease(original.host.ip()));
        original
    }

    fn attach(overlay: &mut Overlay, options: &HostOptions, mtu: u32) -> Original {
        let subnet = free_subnet(overlay);
        let mut host = overlay.lab.host_with("original", options).unwrap();
        let gateway = Ipv4Addr::from(u32::from(subnet.network()) + 1);
        let env = SubnetEnv {
            subnet: Ipv4Net::new_assert(gateway, subnet.prefix_len()),
            mtu,
        };
        Original {
            container: host.add_container("oc", env).unwrap(),
            subnet,
            mac: Self::MAC,
            host,
        }
    }
}
