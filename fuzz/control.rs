//! The targets for what comes from the registry and from files.

use flannel::{
    lease::{
        choose::choose,
        record::{Lease, LeaseValue, Subnets},
    },
    network::{AddressPlan, Block, Network},
    registry::{Record, Revision},
    subnet_file::{Previous, Share, SubnetFile},
};
use serde_json::Value;

/// A subnet's key that is read is written back the same, in each of its forms; one that is not has a message of one line.
pub fn subnet_key(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let record = |key: String| Record {
        key,
        value: br#"{"PublicIP":"192.0.2.1"}"#.into(),
        revision: Revision(1),
        created: Revision(1),
        ttl: None,
    };
    match text.parse::<Subnets>() {
        Ok(subnets) => {
            assert_eq!(subnets.to_string(), text);
            assert_eq!(Subnets::from_cidrs(&subnets.to_cidrs()), Ok(subnets));
            assert_eq!(Subnets::new(subnets.v4(), subnets.v6()), subnets);
            assert_eq!(
                Lease::from_record(&record(subnets.key())).map(|lease| lease.subnets),
                Ok(subnets)
            );
        }
        Err(error) => {
            one_line(&error);
            one_line(&Lease::from_record(&record(format!("subnets/{text}"))).unwrap_err());
        }
    }
}

/// A configuration that is accepted obeys all the rules, has room for a host, and means the same when it is spelt out; one
/// that is not has a message of one line.
pub fn network_config(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    match Network::parse(text) {
        Ok(parsed) => {
            let network = parsed.network;
            assert!(network.ipv4().is_some() || network.ipv6().is_some());
            network.ipv4().inspect(|plan| sound(plan));
            network.ipv6().inspect(|plan| sound(plan));
            let again = Network::parse(&Value::Object(network.to_json()).to_string()).unwrap();
            assert_eq!((again.network, again.warnings), (network, vec![]));
            assert!(
                parsed.warnings.iter().all(|warning| !warning.contains('\n')),
                "{:?}",
                parsed.warnings
            );
        }
        Err(error) => one_line(&error),
    }
}

fn sound<N: Block>(plan: &AddressPlan<N>) {
    let (network, min, max) = (plan.network(), plan.min(), plan.max());
    assert!(network.length() >= 1 && plan.subnet_len() >= network.length() + 2 && plan.subnet_len() <= N::BITS - 2);
    for bound in [min, max] {
        assert_eq!(
            (bound.length(), N::around(bound.first(), bound.length())),
            (plan.subnet_len(), bound)
        );
        assert!(network.first() <= bound.first() && bound.last() <= network.last() && plan.fits(&bound));
    }
    assert!(min <= max && plan.count() >= 1 && (plan.count() == 1) == (min == max));

    let first = choose(plan, [], None, 0).unwrap();
    assert_eq!(first, min);
    assert_eq!(choose(plan, [], Some(max), 0), Ok(max));
    match choose(plan, [first], None, 99) {
        Ok(second) => assert!(plan.fits(&second) && !second.overlaps(&first)),
        Err(out) => assert_eq!((out.exist, min), (1, max)),
    }
    assert!(choose(plan, [network], None, 0).is_err());
}

/// A lease's value that is read is written so that it reads the same, and then always to the same bytes.
pub fn lease_value(data: &[u8]) {
    match LeaseValue::parse(data) {
        Ok(value) => {
            let bytes = value.to_bytes();
            let again = LeaseValue::parse(&bytes).unwrap();
            assert_eq!(again, value);
            assert_eq!(again.to_bytes(), bytes);
        }
        Err(error) => one_line(&error),
    }
}

/// Whatever an earlier run or a person left in the file: blocks that are read have no host bits, and a file written from
/// them reads the same.
pub fn subnet_file(data: &[u8]) {
    let previous = Previous::parse(&String::from_utf8_lossy(data));
    let Previous {
        network,
        subnet,
        ipv6_network,
        ipv6_subnet,
    } = previous;
    assert!(
        [network, subnet]
            .into_iter()
            .flatten()
            .all(|block| block.trunc() == block)
    );
    assert!(
        [ipv6_network, ipv6_subnet]
            .into_iter()
            .flatten()
            .all(|block| block.trunc() == block)
    );

    let ipv4 = network.zip(subnet).map(|(network, subnet)| Share { network, subnet });
    let ipv6 = ipv6_network
        .zip(ipv6_subnet)
        .map(|(network, subnet)| Share { network, subnet });
    let text = SubnetFile {
        ipv4,
        ipv6,
        mtu: 1472,
        ip_masq: true,
    }
    .render();
    let expected = Previous {
        network: ipv4.map(|share| share.network),
        subnet: ipv4.map(|share| share.subnet),
        ipv6_network: ipv6.map(|share| share.network),
        ipv6_subnet: ipv6.map(|share| share.subnet),
    };
    assert_eq!(Previous::parse(&text), expected);
    assert!(
        text.lines()
            .all(|line| line.starts_with("FLANNEL_") && line.contains('=')),
        "{text}"
    );
}

/// Messages end up in logs, where a second line is somebody else's.
fn one_line(error: &dyn std::error::Error) {
    let message = error.to_string();
    assert!(!message.is_empty() && !message.contains('\n'), "{message:?}");
}
