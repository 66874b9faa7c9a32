//! Where one network's keys are in a registry that several share.

use std::fmt;

use super::Record;

/// The common start of a network's keys, with one leading slash and no trailing one (`/coreos.com/network`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Prefix(String);

impl Prefix {
    /// Reads a prefix as people write it: the leading slash is optional and trailing ones are ignored. The original takes
    /// it literally, and a prefix that is one slash off is what its users stumble over most.
    pub(crate) fn new(written: &str) -> Prefix {
        match written.trim_matches('/') {
            "" => Prefix(String::new()),
            body => Prefix(format!("/{body}")),
        }
    }

    /// The prefix without its leading slash, for keys that were written so.
    pub(crate) fn without_slash(&self) -> Prefix {
        Prefix(self.0.trim_start_matches('/').to_owned())
    }

    /// The full name of a key.
    pub(crate) fn full(&self, key: &str) -> String {
        format!("{}/{key}", self.0)
    }

    /// The name of a key without the prefix; a key of another network stays as it is.
    pub(crate) fn relative<'a>(&self, full: &'a str) -> &'a str {
        full.strip_prefix(&self.0)
            .and_then(|rest| rest.strip_prefix('/'))
            .unwrap_or(full)
    }

    /// The record with its key relative to the prefix.
    pub(crate) fn relative_record(&self, record: Record) -> Record {
        Record {
            key: self.relative(&record.key).to_owned(),
            ..record
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "/" } else { &self.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_spellings_are_one_prefix() {
        for written in [
            "/atomic.io/network",
            "atomic.io/network",
            "/atomic.io/network/",
            "atomic.io/network//",
        ] {
            assert_eq!(
                Prefix::new(written).full("config"),
                "/atomic.io/network/config",
                "{written}"
            );
        }
        assert_eq!(Prefix::new("/").full("config"), "/config");
        assert_eq!(Prefix::new("").to_string(), "/");
    }

    #[test]
    fn a_full_key_and_its_relative_one_lead_to_each_other() {
        let prefix = Prefix::new("/atomic.io/network");
        assert_eq!(
            prefix.relative("/atomic.io/network/subnets/10.5.1.0-24"),
            "subnets/10.5.1.0-24"
        );
        let bare = prefix.without_slash();
        assert_eq!(bare.full("config"), "atomic.io/network/config");
        assert_eq!(bare.relative("atomic.io/network/config"), "config");
    }
}
