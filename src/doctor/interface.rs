//! The interface that faces the other hosts.

use super::{Check, Group};
use crate::{kernel::external::External, observe::status::Status};

pub(super) fn judge(chosen: &Result<External, String>, status: Option<&Status>) -> Vec<Check> {
    const NAME: &str = "external";
    let used = status.and_then(|status| status.external.as_ref());
    let check = match (chosen, used) {
        (Err(why), _) => Check::fail(
            Group::Interface,
            NAME,
            why.as_str(),
            "name the interface with --iface (FLANNELD_IFACE), as `ip -br address` shows it",
        ),
        (Ok(chosen), Some(used)) if (chosen.address, &chosen.name) != (used.address, &used.interface) => Check::warn(
            Group::Interface,
            NAME,
            format!(
                "the daemon uses {} ({}), and would choose {} ({}) by the flags given here",
                used.interface, used.address, chosen.name, chosen.address
            ),
            "give the daemon's own flags here, or restart it if its interface has changed: `systemctl restart flanneld`",
        ),
        (Ok(chosen), _) => {
            let public = if chosen.public_ip == chosen.address {
                String::new()
            } else {
                format!(", PublicIP {}", chosen.public_ip)
            };
            Check::ok(
                Group::Interface,
                NAME,
                format!("{}, {}, MTU {}{public}", chosen.name, chosen.address, chosen.mtu),
            )
        }
    };
    vec![check]
}

#[cfg(test)]
mod tests {
    use super::{super::State, *};
    use crate::observe::{board::Board, status};

    #[test]
    fn an_interface_that_changed_under_the_daemon_is_noted() {
        let chosen = Ok(External {
            index: 2,
            name: "eth0".to_owned(),
            mtu: 1500,
            address: [192, 0, 2, 1].into(),
            public_ip: [192, 0, 2, 1].into(),
        });
        let mut status = Board::new("a test".to_owned()).status();
        status.external = Some(status::External {
            interface: "eth0".to_owned(),
            address: [192, 0, 2, 1].into(),
            mtu: 1500,
            public_ip: [192, 0, 2, 1].into(),
        });
        assert_eq!(judge(&chosen, Some(&status))[0].state, State::Ok);
        status.external.as_mut().unwrap().address = [192, 0, 2, 7].into();
        assert_eq!(judge(&chosen, Some(&status))[0].state, State::Warn);
        assert_eq!(judge(&chosen, None)[0].state, State::Ok);
        assert_eq!(judge(&Err("none".to_owned()), None)[0].state, State::Fail);
    }
}
