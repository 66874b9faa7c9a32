//! What of the host itself keeps packets from being forwarded, or from being seen by rules.

use std::{fs, path::Path};

use super::{Family, Rules};

/// The kernel's settings.
pub(super) const SYSCTLS: &str = "/proc/sys/net";

/// What to tell the user, each with its remedy.
pub(super) fn warnings(sysctls: &Path, rules: &[Rules], masquerade: bool, iptables: bool) -> Vec<String> {
    let mut warnings = Vec::new();
    let wanted = |family| rules.iter().any(|rules| rules.family == family && !rules.is_empty());
    for (family, key) in [
        (Family::V4, "ipv4/ip_forward"),
        (Family::V6, "ipv6/conf/all/forwarding"),
    ] {
        // A setting that cannot be read is one of a kernel that we do not know: no warning.
        let off = fs::read_to_string(sysctls.join(key)).is_ok_and(|value| value.trim() == "0");
        if wanted(family) && off {
            let name = key.replace('/', ".");
            warnings.push(format!(
                "this host does not forward {} packets (net.{name} is 0), so its containers reach no other host. Docker turns \
                 that on when it starts; else do it with `sysctl -w net.{name}=1`",
                family.name()
            ));
        }
    }
    // Only who masquerades has traffic that comes back to the same bridge with another address, through a service.
    if iptables && masquerade && !sysctls.join("bridge").exists() {
        warnings.push(
            "the kernel module br_netfilter is not loaded, so iptables does not see packets between containers on one bridge. \
             The overlay does not need that, but Kubernetes' services and policies do: `modprobe br_netfilter`, and a file in \
             /etc/modules-load.d for the next boot"
                .to_owned(),
        );
    }
    warnings
}

#[cfg(test)]
mod tests {
    use std::{env, process};

    use super::{
        super::tests::{ALL, v4, v6},
        *,
    };

    #[test]
    fn what_the_host_lacks_is_said_with_the_remedy() {
        let dir = env::temp_dir().join(format!("flannel-rules-host-{}", process::id()));
        fs::create_dir_all(dir.join("ipv4")).unwrap();
        fs::create_dir_all(dir.join("ipv6/conf/all")).unwrap();
        fs::write(dir.join("ipv4/ip_forward"), "0\n").unwrap();
        fs::write(dir.join("ipv6/conf/all/forwarding"), "0\n").unwrap();

        let told = |rules: &[Rules], masquerade, iptables| warnings(&dir, rules, masquerade, iptables).join("\n");
        let both = [v4(&ALL), v6(&ALL)];
        let all = told(&both, true, true);
        for remedy in [
            "sysctl -w net.ipv4.ip_forward=1",
            "sysctl -w net.ipv6.conf.all.forwarding=1",
            "modprobe br_netfilter",
        ] {
            assert!(all.contains(remedy), "{remedy}: {all}");
        }
        let ipv4 = told(&both[..1], false, true);
        assert!(
            ipv4.contains("ipv4") && !ipv4.contains("ipv6") && !ipv4.contains("br_netfilter"),
            "{ipv4}"
        );
        assert!(!told(&both, true, false).contains("br_netfilter"));

        fs::write(dir.join("ipv4/ip_forward"), "1\n").unwrap();
        fs::write(dir.join("ipv6/conf/all/forwarding"), "1\n").unwrap();
        fs::create_dir(dir.join("bridge")).unwrap();
        assert_eq!(told(&both, true, true), "");
        fs::remove_dir_all(dir).unwrap();
    }
}
