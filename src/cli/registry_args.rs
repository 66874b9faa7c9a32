//! Which registry, and how to get in.

use std::{fmt, path::PathBuf, sync::Arc};

use clap::{ArgMatches, Args};
use tracing::warn;

use super::Place;
use crate::{
    registry::{
        self, Registry,
        etcd::{self, EtcdConfig, EtcdRegistry},
        file::FileRegistry,
    },
    sandbox::Places,
    sys::arguments,
};

/// Where the network's configuration and leases are kept. All flags stand before or after a subcommand.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
#[command(next_help_heading = "Registry (where the network's configuration and leases are)")]
pub struct RegistryArgs {
    /// etcd's addresses, separated by commas
    #[arg(
        long,
        env = "FLANNELD_ETCD_ENDPOINTS",
        value_name = "URL,...",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:4001,http://127.0.0.1:2379",
        global = true
    )]
    pub etcd_endpoints: Vec<String>,

    /// What the keys of this network begin with
    #[arg(
        long,
        env = "FLANNELD_ETCD_PREFIX",
        value_name = "PREFIX",
        default_value = "/coreos.com/network",
        global = true
    )]
    pub etcd_prefix: String,

    /// The authority that etcd's certificate is checked against, PEM
    #[arg(long, env = "FLANNELD_ETCD_CAFILE", value_name = "FILE", global = true)]
    pub etcd_cafile: Option<PathBuf>,

    /// This client's certificate for etcd, PEM
    #[arg(long, env = "FLANNELD_ETCD_CERTFILE", value_name = "FILE", global = true)]
    pub etcd_certfile: Option<PathBuf>,

    /// The key of --etcd-certfile, PEM
    #[arg(long, env = "FLANNELD_ETCD_KEYFILE", value_name = "FILE", global = true)]
    pub etcd_keyfile: Option<PathBuf>,

    /// The user's name at etcd
    #[arg(long, env = "FLANNELD_ETCD_USERNAME", value_name = "NAME", global = true)]
    pub etcd_username: Option<String>,

    /// The user's password at etcd; better in a file or in the environment: other users may see a command line for the moment
    /// until it is masked, and shells remember it
    #[arg(
        long,
        env = "FLANNELD_ETCD_PASSWORD",
        hide_env_values = true,
        value_name = "PASSWORD",
        global = true
    )]
    pub etcd_password: Option<Secret>,

    /// A file with the user's password at etcd, alone or on its first line
    #[arg(long, env = "FLANNELD_ETCD_PASSWORD_FILE", value_name = "FILE", global = true)]
    pub etcd_password_file: Option<PathBuf>,

    /// Keep all in this directory instead of etcd: for the daemons of one machine
    #[arg(long, env = "FLANNELD_REGISTRY_DIR", value_name = "DIR", global = true)]
    pub registry_dir: Option<PathBuf>,
}

impl RegistryArgs {
    /// The registry that the flags name. etcd need not be there yet.
    ///
    /// # Errors
    /// What the user must mend in the flags, or in the directory.
    pub fn open(&self) -> Result<Arc<dyn Registry>, OpenError> {
        if let Some(dir) = &self.registry_dir {
            return Ok(Arc::new(FileRegistry::open(dir, &self.etcd_prefix)?));
        }
        Ok(Arc::new(EtcdRegistry::connect(self.etcd_config())?))
    }

    /// What the flags say of etcd.
    pub fn etcd_config(&self) -> EtcdConfig {
        EtcdConfig {
            endpoints: self.etcd_endpoints.clone(),
            prefix: self.etcd_prefix.clone(),
            ca_file: self.etcd_cafile.clone(),
            cert_file: self.etcd_certfile.clone(),
            key_file: self.etcd_keyfile.clone(),
            username: self.etcd_username.clone(),
            password: self.etcd_password.as_ref().map(|password| password.expose().to_owned()),
            password_file: self.etcd_password_file.clone(),
        }
    }

    /// The files that the registry reads, and those that it writes.
    pub(super) fn files(&self) -> Places {
        match &self.registry_dir {
            // The name of a file in it is of no matter.
            Some(dir) => Places {
                read: vec![],
                write: vec![dir.join("registry")],
            },
            None => {
                let named = [
                    &self.etcd_cafile,
                    &self.etcd_certfile,
                    &self.etcd_keyfile,
                    &self.etcd_password_file,
                ];
                Places {
                    read: named.into_iter().flatten().cloned().collect(),
                    write: vec![],
                }
            }
        }
    }

    /// Masks the password where other users of this host see it, on the command line.
    pub(super) fn hide_password(&self) {
        let Some(password) = &self.etcd_password else { return };
        if let Err(error) = arguments::hide(password.expose()) {
            warn!(
                "whoever runs `ps` on this host may see the password for etcd, which cannot be masked on the command line \
                 ({error}): give it by --etcd-password-file"
            );
        }
    }

    /// Settles what was given together but excludes each other. The command line wins over the environment, and that over
    /// defaults; what is given twice at the same place is the user's to decide.
    ///
    /// # Errors
    /// For people, on one line.
    pub(super) fn settle(&mut self, matches: &ArgMatches) -> Result<(), String> {
        let dir = Place::of("registry_dir", matches);
        let endpoints = Place::of("etcd_endpoints", matches);
        if dir > Place::Default && dir == endpoints {
            return Err("--registry-dir and --etcd-endpoints are two places for one registry: give one of them".into());
        }
        if dir < endpoints {
            self.registry_dir = None;
        }
        let password = Place::of("etcd_password", matches);
        let file = Place::of("etcd_password_file", matches);
        if password > Place::Default && password == file {
            return Err(
                "--etcd-password and --etcd-password-file are two places for one password: give one of them".into(),
            );
        }
        if password < file {
            self.etcd_password = None;
        } else if file < password {
            self.etcd_password_file = None;
        }
        Ok(())
    }
}

/// Why the registry that the flags name cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A flag for etcd is wrong.
    #[error(transparent)]
    Etcd(#[from] etcd::ConfigError),
    /// The directory is.
    #[error(transparent)]
    Directory(#[from] registry::Error),
}

/// A text that does not show itself in logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Secret(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}
