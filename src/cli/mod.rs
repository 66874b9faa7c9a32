//! The command line: the original's flags in Go's style, `FLANNELD_*` variables, and the subcommands.
//!
//! [`parse`] gives an [`Invocation`] of plain, typed values; what is not one of those has ended in a message already.

pub mod demo;
pub mod docker_opts;
pub mod doctor;
mod go_flags;
pub mod leases;
pub mod network;
pub mod pages;
mod registry_args;
mod run_args;
pub mod status;
mod table;

use std::{
    env,
    ffi::OsString,
    io::{self, Write},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use clap::{
    Arg, ArgMatches, Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand, error::ErrorKind,
    parser::ValueSource,
};

pub use self::{
    docker_opts::DockerOptsArgs,
    doctor::DoctorArgs,
    leases::LeasesArgs,
    network::NetworkArgs,
    pages::{CompletionsArgs, ManArgs},
    registry_args::{OpenError, RegistryArgs, Secret},
    run_args::{RunArgs, Workers},
    status::StatusArgs,
};

use crate::{daemon, observe, registry::Registry, sandbox::Sandbox};

const ABOUT: &str = "An overlay network for containers: a subnet for each host, and packets between them.

Without a subcommand, flanneld is this host's daemon (`flanneld run` is the same). It reads the
network's configuration from the registry, leases a subnet for this host, writes it to the subnet
file, and carries packets to the other hosts.

  flanneld network set --network 10.5.0.0/16      once, for the whole network
  flanneld --iface eth1                           on every host";

const AFTER_HELP: &str = "\
A flag may have one dash or two. Each is also read from the environment, as FLANNELD_ and its name
in capitals with underscores (FLANNELD_ETCD_ENDPOINTS); the command line wins. A BOOL may be left
out: --ip-masq is --ip-masq=true.";

#[derive(Parser)]
#[command(name = "flanneld", version, about = ABOUT, after_help = AFTER_HELP)]
#[command(max_term_width = 120)]
struct Cli {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    registry: RegistryArgs,
    /// How much to log, 0 to 10
    #[arg(
        long = "v",
        short = 'v',
        env = "FLANNELD_V",
        value_name = "LEVEL",
        default_value_t = 0,
        value_parser = clap::value_parser!(u8).range(0..=10),
        help_heading = "Logging",
        global = true
    )]
    verbosity: u8,
    #[command(subcommand)]
    command: Option<Action>,
}

/// What to do.
#[derive(Debug, Clone, Subcommand)]
pub enum Action {
    /// Be this host's daemon.
    #[command(skip)]
    Run(Box<RunArgs>),
    /// Show or write the network's configuration
    Network(NetworkArgs),
    /// Show, reserve and release the hosts' subnets
    Leases(LeasesArgs),
    /// Show what this host's daemon is doing
    Status(StatusArgs),
    /// Find what is wrong on this host, and what to do about it
    Doctor(DoctorArgs),
    /// Build a network of several hosts on this machine and try it out
    Demo(DemoArgs),
    /// Write Docker's options from the subnet file, as mk-docker-opts.sh
    DockerOpts(DockerOptsArgs),
    /// Write the manual, for packages
    #[command(hide = true)]
    Man(ManArgs),
    /// Write a shell's completions, for packages
    #[command(hide = true)]
    Completions(CompletionsArgs),
}

/// `flanneld demo`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct DemoArgs {
    /// How many hosts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=20))]
    pub hosts: u8,
    /// What carries the packets
    #[arg(long, value_name = "TYPE", value_enum, default_value_t)]
    pub backend: demo::DemoBackend,
    /// Leave the hosts there, and say how to enter them
    #[arg(long)]
    pub keep: bool,
    /// Use a real etcd server, not the registry in a directory
    #[arg(long)]
    pub etcd: bool,
    /// Remove what --keep has left, and do nothing else
    #[arg(long, conflicts_with_all = ["hosts", "backend", "keep", "etcd"])]
    pub down: bool,
}

/// A command line that makes sense.
#[derive(Debug, Clone)]
pub struct Invocation {
    /// Where the network is configured.
    pub registry: RegistryArgs,
    /// How much to log, 0 to 10.
    pub verbosity: u8,
    /// What to do.
    pub action: Action,
}

/// Reads a command line, the program's name first, and the environment.
///
/// # Errors
/// What clap has to tell the user, `--help` and `--version` among it: `exit()` prints it and ends the process with status
/// 0 or 2.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, clap::Error> {
    let mut command = command();
    let args = go_flags::rewrite(&command, args);
    let matches = command.try_get_matches_from_mut(args)?;
    let mut cli = Cli::from_arg_matches(&matches)?;

    if let Some(name) = matches.subcommand_name() {
        let given = |arg: &&Arg| matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
        let stray = command
            .get_arguments()
            .filter(|arg| !arg.is_global_set())
            .find(given)
            .and_then(Arg::get_long);
        if let Some(flag) = stray {
            let takes_it = command
                .find_subcommand(name)
                .is_some_and(|subcommand| subcommand.get_arguments().any(|arg| arg.get_long() == Some(flag)));
            let message = if takes_it {
                format!("--{flag} stands before `{name}`: write it after that, as in `flanneld {name} --{flag}`")
            } else {
                format!("--{flag} is the daemon's flag; `flanneld {name}` does not take it")
            };
            return Err(command.error(ErrorKind::ArgumentConflict, message));
        }
    }
    let mut settled = cli.registry.settle(&matches);
    if cli.command.is_none() {
        settled = settled.and_then(|()| cli.run.settle(&matches));
    }
    settled.map_err(|message| command.error(ErrorKind::ArgumentConflict, message))?;
    Ok(Invocation {
        registry: cli.registry,
        verbosity: cli.verbosity,
        action: cli.command.unwrap_or_else(|| Action::Run(Box::new(cli.run))),
    })
}

/// Where a flag's value comes from; the later of two places wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Default,
    Environment,
    CommandLine,
}

impl Place {
    /// That of the flag whose field is called `id`.
    fn of(id: &str, matches: &ArgMatches) -> Self {
        match matches.value_source(id) {
            Some(ValueSource::CommandLine) => Place::CommandLine,
            Some(ValueSource::EnvVariable) => Place::Environment,
            _ => Place::Default,
        }
    }
}

/// Does what the command line says. Errors go to standard error, in one line.
pub fn execute(invocation: Invocation) -> ExitCode {
    observe::log_to_stderr(invocation.verbosity);
    invocation.registry.hide_password();
    let done = match invocation.action {
        // Blocks, and starts processes that die with its thread: no runtime.
        Action::Demo(args) => {
            return demo::run(&args).map_or_else(|error| failed(&error, error.exit_code()), |()| ExitCode::SUCCESS);
        }
        Action::Doctor(args) => {
            let wrong = doctor::run(&args, &invocation.registry, &mut io::stdout());
            return wrong.map_or_else(|error| failed(&error, 1), |wrong| ExitCode::from(u8::from(wrong)));
        }
        Action::Status(args) => status::run(&args, &mut io::stdout()).map_err(Into::into),
        Action::DockerOpts(args) => docker_opts::run(&args).map_err(AnyError::from),
        Action::Man(args) => pages::man(&args, command(), &mut io::stdout()).map_err(AnyError::from),
        Action::Completions(args) => pages::completions(&args, command(), &mut io::stdout()).map_err(AnyError::from),
        Action::Run(args) => {
            // Before there is a second thread, which would keep what it has.
            let sandbox = if args.sandbox {
                let mut places = invocation.registry.files();
                places.write.extend(args.written());
                Sandbox::enter(&places)
            } else {
                Sandbox::default()
            };
            with_registry(invocation.registry, async |registry| {
                Ok(daemon::run(args.settings(registry, sandbox)).await?)
            })
        }
        Action::Network(args) => with_registry(invocation.registry, async |registry| {
            Ok(network::run(&args, &*registry, &mut io::stdout()).await?)
        }),
        Action::Leases(args) => with_registry(invocation.registry, async |registry| {
            Ok(leases::run(&args, &*registry, &mut io::stdout()).await?)
        }),
    };
    done.map_or_else(|error| failed(&*error, 1), |()| ExitCode::SUCCESS)
}

type AnyError = Box<dyn std::error::Error>;

/// How long a thread for what blocks, such as looking up a name, waits for more. One that was started before the daemon has settled
/// has the rights of that time ([`crate::sandbox`]), and must not live on with them; starting another one takes microseconds.
const HELPER_LIFE: Duration = Duration::from_millis(100);

/// Runs `work` with the registry on a runtime of one thread.
fn with_registry(
    args: RegistryArgs,
    work: impl AsyncFnOnce(Arc<dyn Registry>) -> Result<(), AnyError>,
) -> Result<(), AnyError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(HELPER_LIFE)
        .build()?;
    let outcome = runtime.block_on(async { work(args.open()?).await });
    // Does not wait for a name server that does not answer: names are looked up on threads that nothing can interrupt.
    runtime.shutdown_background();
    outcome
}

fn failed(error: &dyn std::error::Error, code: u8) -> ExitCode {
    // Whoever cannot read the reason still gets the code.
    let _ = writeln!(io::stderr(), "flanneld: {}", observe::chain(error));
    ExitCode::from(code)
}

/// The whole of the command line, for [`parse`] and for manual pages.
pub fn command() -> Command {
    Cli::command()
        // The help says once how they are named.
        .mut_args(|arg| go_flags::as_go_boolean(without_empty_env(arg).hide_env(true)))
        .mut_subcommands(|subcommand| subcommand.mut_args(without_empty_env))
        .mut_subcommand("doctor", with_the_daemons_flags)
}

/// Lets a subcommand be given all flags of the daemon, as they stand in a service's options; those that it has no use for it does
/// not look at.
fn with_the_daemons_flags(subcommand: Command) -> Command {
    let own: Vec<String> = subcommand.get_arguments().map(|arg| arg.get_id().to_string()).collect();
    let daemon = RunArgs::augment_args(Command::new("flanneld"));
    let others = daemon
        .get_arguments()
        .filter(|arg| !own.contains(&arg.get_id().to_string()))
        .map(|arg| go_flags::as_go_boolean(arg.clone().hide(true).env(None::<&'static str>)));
    subcommand.args(others)
}

/// An empty variable is an unset one, as in the original: service files are full of `FLANNELD_IFACE=`.
fn without_empty_env(arg: Arg) -> Arg {
    let empty = arg
        .get_env()
        .and_then(env::var_os)
        .is_some_and(|value| value.is_empty());
    if empty { arg.env(None::<&'static str>) } else { arg }
}

#[cfg(test)]
mod tests {
    use std::{fs, process};

    use super::{demo::DemoBackend, *};
    use crate::{
        backend::udp::{IoMode, Options, TunMode},
        registry::memory::MemoryRegistry,
        rules,
    };

    fn invocation(line: &str) -> Result<Invocation, clap::Error> {
        parse(format!("flanneld {line}").split_whitespace().map(OsString::from))
    }

    fn run(line: &str) -> RunArgs {
        match invocation(line).unwrap().action {
            Action::Run(args) => *args,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn error(line: &str) -> String {
        invocation(line).unwrap_err().to_string()
    }

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn each_flag_is_read_from_the_variable_of_its_name() {
        let command = Cli::command();
        for arg in command.get_arguments() {
            let flag = arg.get_long().unwrap();
            let variable = format!("FLANNELD_{}", flag.to_uppercase().replace('-', "_"));
            assert_eq!(arg.get_env(), Some(variable.as_ref()), "{flag}");
        }
    }

    #[test]
    fn all_of_the_originals_flags_are_there() {
        let command = Cli::command();
        let flags: Vec<&str> = command.get_arguments().filter_map(Arg::get_long).collect();
        for flag in
            "etcd-endpoints etcd-prefix etcd-keyfile etcd-certfile etcd-cafile etcd-username etcd-password iface \
            iface-regex iface-can-reach public-ip public-ipv6 subnet-file subnet-lease-renew-margin ip-masq \
            ip-masq-fully-random-disable iptables-resync iptables-forward-rules ip-blackhole-route healthz-ip \
            healthz-port v"
                .split(' ')
        {
            assert!(flags.contains(&flag), "{flag}");
        }
    }

    #[test]
    fn defaults_are_the_originals() {
        let Invocation {
            registry, verbosity, ..
        } = invocation("").unwrap();
        assert_eq!(
            registry.etcd_endpoints,
            ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]
        );
        assert_eq!(registry.etcd_prefix, "/coreos.com/network");
        assert_eq!((registry.registry_dir, registry.etcd_username), (None, None));
        assert_eq!(verbosity, 0);
        let args = run("");
        assert_eq!(args.subnet_file.to_str(), Some("/run/flannel/subnet.env"));
        assert_eq!(args.subnet_lease_renew_margin, Duration::from_secs(3600));
        assert_eq!(args.iptables_resync, Duration::from_secs(5));
        assert!(!args.ip_masq && !args.ip_masq_fully_random_disable && !args.ip_blackhole_route);
        assert!(args.iptables_forward_rules);
        assert_eq!(
            (args.healthz_ip.to_string().as_str(), args.healthz_port),
            ("0.0.0.0", 0)
        );
        assert!(args.iface.is_empty() && args.iface_regex.is_empty() && args.iface_can_reach.is_none());
        assert_eq!((args.workers, args.tun), (None, TunMode::Auto));
        assert_eq!(
            (args.io, args.pin, args.busy_poll),
            (IoMode::Auto, false, Duration::ZERO)
        );
        assert!(args.offload && args.sandbox);
    }

    #[test]
    fn flags_are_read_in_gos_style() {
        let args = run(
            "run -iface eth0 --iface=10.1.2.3 -iface-regex ^192\\.168\\.[0-9]{1,3}\\. -public-ip=192.0.2.1 -ip-masq \
             --iptables-forward-rules=F -subnet-lease-renew-margin 1439 -healthz-port=8080 -workers 4 -tun plain",
        );
        assert_eq!(args.iface, ["eth0", "10.1.2.3"]);
        assert!(args.iface_regex[0].is_match("192.168.1.7"));
        assert_eq!(args.public_ip, Some([192, 0, 2, 1].into()));
        assert!(args.ip_masq && !args.iptables_forward_rules);
        assert_eq!(args.subnet_lease_renew_margin, Duration::from_secs(1439 * 60));
        assert_eq!(
            (args.healthz_port, args.workers.unwrap().get(), args.tun),
            (8080, 4, TunMode::Plain)
        );
        assert_eq!(invocation("-v=5").unwrap().verbosity, 5);
        assert_eq!(run("-workers 0").workers, None);
        let args = run("-io=uring -pin -busy-poll 50");
        assert_eq!(
            (args.io, args.pin, args.busy_poll),
            (IoMode::Uring, true, Duration::from_micros(50))
        );
        assert_eq!((run("-io mmsg").io, run("-pin=false").pin), (IoMode::Mmsg, false));
        assert_eq!(run("-busy-poll=1000000").busy_poll, Duration::from_secs(1));
    }

    #[test]
    fn offload_is_turned_off_by_either_of_its_flags() {
        for (line, offload) in [
            ("", true),
            ("-offload", true),
            ("-offload=false", false),
            ("-no-offload", false),
            ("-no-offload=true", false),
            ("-no-offload=false", true),
            ("-no-offload=false -offload=false", false),
            ("-no-offload -offload=false", false),
            ("-no-offload=false -offload", true),
        ] {
            assert_eq!(run(line).offload, offload, "{line}");
        }
        assert!(error("-offload=true -no-offload").contains("--offload=true and --no-offload contradict each other"));
    }

    #[test]
    fn what_the_daemon_gets_is_what_the_flags_say() {
        let options = |line| {
            run(line)
                .settings(Arc::new(MemoryRegistry::new()), Sandbox::default())
                .udp
        };
        let Options {
            workers,
            offload,
            tun,
            io,
            pin,
            busy_poll,
        } = options("-workers 2 -no-offload -tun plain -io mmsg -pin -busy-poll 20");
        assert_eq!((workers.unwrap().get(), offload, tun), (2, false, TunMode::Plain));
        assert_eq!((io, pin, busy_poll), (IoMode::Mmsg, true, Duration::from_micros(20)));
    }

    #[test]
    fn the_rules_are_those_that_the_flags_ask_for() {
        let options = |line| {
            run(line)
                .settings(Arc::new(MemoryRegistry::new()), Sandbox::default())
                .rules
        };
        let defaults = rules::Options {
            masquerade: false,
            fully_random: true,
            forward: true,
            resync: Duration::from_secs(5),
        };
        assert_eq!(options(""), defaults);
        let chosen = rules::Options {
            masquerade: true,
            fully_random: false,
            forward: false,
            resync: Duration::from_secs(60),
        };
        let line = "-ip-masq -ip-masq-fully-random-disable -iptables-forward-rules=false -iptables-resync 60";
        assert_eq!(options(line), chosen);
    }

    #[test]
    fn registry_flags_stand_before_or_after_a_subcommand() {
        for line in [
            "-etcd-endpoints http://192.0.2.1:2379,http://192.0.2.2:2379 leases list",
            "leases list -etcd-endpoints=http://192.0.2.1:2379,http://192.0.2.2:2379",
            "leases --etcd-endpoints http://192.0.2.1:2379 --etcd-endpoints http://192.0.2.2:2379 list",
        ] {
            let Invocation { registry, action, .. } = invocation(line).unwrap();
            assert_eq!(
                registry.etcd_endpoints,
                ["http://192.0.2.1:2379", "http://192.0.2.2:2379"],
                "{line}"
            );
            assert!(matches!(action, Action::Leases(_)), "{line}");
        }
    }

    #[test]
    fn the_doctor_takes_what_a_service_gives_the_daemon() {
        let line = "doctor -etcd-endpoints=http://192.0.2.1:2379 -etcd-prefix= --iface=eth1 --ip-masq -iptables-resync 10 \
                    --subnet-file /run/x.env -healthz-port=8080 -workers 2 -offload=false -public-ipv6 fd00::1 -v 2 --json";
        let Invocation { registry, action, .. } = invocation(line).unwrap();
        assert_eq!(registry.etcd_endpoints, ["http://192.0.2.1:2379"]);
        assert_eq!(registry.etcd_prefix, "/coreos.com/network");
        let Action::Doctor(args) = action else {
            panic!("{action:?}")
        };
        let said = format!("{args:?}");
        assert!(
            said.contains(r#"iface: ["eth1"]"#) && said.contains("/run/x.env"),
            "{said}"
        );
        assert!(error("-ip-masq doctor").contains("`flanneld doctor --ip-masq`"));
        // Without being offered.
        let help = error("doctor --help");
        assert!(help.contains("--iface ") && !help.contains("--ip-masq"), "{help}");
        assert!(error("doctor --ip-mask").contains("--ip-masq"));
        assert!(error("status --ip-masq").contains("--ip-masq"));
    }

    #[test]
    fn the_directory_wins_over_default_endpoints_and_excludes_given_ones() {
        let registry = invocation("network get -registry-dir /srv/r").unwrap().registry;
        assert_eq!(registry.registry_dir.unwrap().to_str(), Some("/srv/r"));
        assert!(error("-registry-dir /srv/r -etcd-endpoints http://192.0.2.1:2379").contains("give one of them"));
        assert!(
            error("-registry-dir /srv/r network get -etcd-endpoints http://192.0.2.1").contains("give one of them")
        );
    }

    #[test]
    fn the_registry_that_is_named_is_opened() {
        let open = |line: &str| invocation(line).unwrap().registry.open();
        let dir = env::temp_dir().join(format!("flannel-cli-registry-{}", process::id()));
        let registry = open(&format!(
            "-registry-dir {} -etcd-prefix atomic.io/network/",
            dir.display()
        ))
        .unwrap();
        assert_eq!(registry.full_key("config"), "/atomic.io/network/config");
        assert!(registry.describe().contains(&dir.display().to_string()));
        fs::remove_dir_all(dir).unwrap();
        let etcd = open("-etcd-endpoints http://192.0.2.1:2379").unwrap();
        assert!(etcd.describe().contains("192.0.2.1"));
        assert!(
            open("-etcd-certfile cert.pem")
                .unwrap_err()
                .to_string()
                .contains("--etcd-keyfile")
        );
    }

    #[test]
    fn the_end_waits_for_no_name_server() {
        let dir = env::temp_dir().join(format!("flannel-cli-end-{}", process::id()));
        let args = invocation(&format!("-registry-dir {}", dir.display()))
            .unwrap()
            .registry;
        let (answer, waiting) = std::sync::mpsc::channel::<()>();
        let (ended, end) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let outcome = with_registry(args, async |_| {
                // As a name that is looked up: begun, and not over for a long time.
                let (begun, begin) = tokio::sync::oneshot::channel();
                tokio::task::spawn_blocking(move || {
                    let _ = begun.send(());
                    waiting.recv()
                });
                Ok(begin.await?)
            });
            ended.send(outcome.is_ok())
        });
        assert_eq!(end.recv_timeout(Duration::from_secs(20)), Ok(true));
        drop(answer);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_password_does_not_show_itself() {
        let registry = invocation("-etcd-username u -etcd-password -s3cret").unwrap().registry;
        assert_eq!(registry.etcd_password.as_ref().unwrap().expose(), "-s3cret");
        assert!(!format!("{registry:?}").contains("s3cret"));
    }

    #[test]
    fn a_wrong_command_line_says_what_would_be_right() {
        for (line, part) in [
            ("-etcd-endpoint=x", "--etcd-endpoints"),
            ("-subnet-lease-renew-margin 1440", "1 to 1439"),
            ("-subnet-lease-renew-margin 0", "1 to 1439"),
            ("-workers 65", "0 to 64"),
            ("-tun fast", "auto or plain"),
            ("-io epoll", "auto, mmsg or uring"),
            ("-pin=2", "true or false"),
            ("-busy-poll 1000001", "microseconds from 0 to 1000000"),
            ("-busy-poll 50us", "without a unit"),
            ("-busy-poll -1", "microseconds from 0"),
            ("-no-offload=maybe", "true or false"),
            ("-pin leases list", "--pin is the daemon's flag"),
            ("-ip-masq=yes", "true or false"),
            ("-iptables-resync 5s", "seconds from 1"),
            ("-iface-regex (", "unclosed group"),
            ("-public-ip fd00::1", "--public-ip"),
            ("-public-ip 0.0.0.0", "the address of one host"),
            (
                "leases reserve 10.5.34.0/24 --public-ip 0.0.0.0",
                "the address of one host",
            ),
            ("-v 11", "0..=10"),
            ("-iface eth0 leases list", "--iface is the daemon's flag"),
            ("lease list", "leases"),
            ("run run", "unrecognized subcommand 'run'"),
            (
                "leases reserve 10.5.34.1/24 --public-ip 192.0.2.1",
                "the subnet is 10.5.34.0/24",
            ),
            ("leases reserve 10.5.34.0 --public-ip 192.0.2.1", "as in 10.5.34.0/24"),
            ("leases reserve 10.5.34.0/24", "--public-ip"),
            ("network set", "--network"),
            ("network set {} --network 10.5.0.0/16", "cannot be used with"),
            ("network set --port 1", "--network"),
            ("network set {} --subnet-len 20", "cannot be used with"),
            ("network set {} --source-check off", "cannot be used with"),
            ("network set --network 10.5.0.0/16 --source-ports 65", "1..=64"),
            ("demo --hosts 1", "2..=20"),
            ("demo --down --keep", "--keep"),
        ] {
            let message = error(line);
            assert!(message.contains(part), "{line}: {message:?} lacks {part:?}");
        }
    }

    #[test]
    fn help_and_version_may_have_one_dash() {
        assert_eq!(invocation("-version").unwrap_err().kind(), ErrorKind::DisplayVersion);
        let help = invocation("-help").unwrap_err();
        assert_eq!(help.kind(), ErrorKind::DisplayHelp);
        for part in [
            "flanneld run",
            "FLANNELD_",
            "--iface",
            "[default: 60]",
            "network",
            "leases",
            "demo",
        ] {
            assert!(help.to_string().contains(part), "{part}");
        }
    }

    #[test]
    fn the_demos_flags_are_read() {
        let demo = |line| match invocation(line).unwrap().action {
            Action::Demo(args) => args,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            demo("demo"),
            DemoArgs {
                hosts: 3,
                backend: DemoBackend::Udp,
                keep: false,
                etcd: false,
                down: false
            }
        );
        assert_eq!(
            demo("demo -hosts=5 -backend=host-gw -keep -etcd"),
            DemoArgs {
                hosts: 5,
                backend: DemoBackend::HostGw,
                keep: true,
                etcd: true,
                down: false
            }
        );
        for (line, backend) in [
            ("demo --backend vxlan", DemoBackend::Vxlan),
            ("demo --backend direct-routing", DemoBackend::DirectRouting),
            ("demo --backend direct", DemoBackend::DirectRouting),
        ] {
            assert_eq!(demo(line).backend, backend);
        }
        assert!(demo("demo --down").down);
    }

    /// Whether this is a child of the test `name`, which runs it alone in an environment of these variables: the
    /// environment belongs to the whole process. To others, that the child has succeeded.
    #[track_caller]
    fn is_child(name: &str, variables: &[(&str, &str)]) -> bool {
        const CHILD: &str = "FLANNEL_TEST_CHILD";
        if env::var_os(CHILD).is_some() {
            return true;
        }
        let child = process::Command::new(env::current_exe().unwrap())
            .args(["--exact", &format!("cli::tests::{name}")])
            .env_clear()
            .env(CHILD, "1")
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&child.stdout);
        assert!(
            child.status.success() && output.contains("1 passed"),
            "{variables:?}: {output}"
        );
        false
    }

    #[test]
    fn the_environment_is_read() {
        let name = "the_environment_is_read";
        let variables = [
            ("FLANNELD_IFACE", "eth0,eth1"),
            ("FLANNELD_IFACE_REGEX", "^10\\.[0-9]{1,3}\\."),
            ("FLANNELD_SUBNET_FILE", "/from/the/environment"),
            ("FLANNELD_IP_MASQ", "true"),
            ("FLANNELD_IPTABLES_FORWARD_RULES", "0"),
            ("FLANNELD_PUBLIC_IP", ""),
            ("FLANNELD_ETCD_ENDPOINTS", "http://192.0.2.1:2379,http://192.0.2.2:2379"),
            ("FLANNELD_ETCD_USERNAME", "root"),
            ("FLANNELD_ETCD_PASSWORD", "s3cret"),
            ("FLANNELD_NO_OFFLOAD", "T"),
            ("FLANNELD_IO", "uring"),
            ("FLANNELD_PIN", "1"),
            ("FLANNELD_BUSY_POLL", "30"),
            ("FLANNELD_V", "7"),
        ];
        if !is_child(name, &variables) {
            return;
        }
        let args = run("-subnet-file /from/the/command/line");
        assert_eq!(args.iface, ["eth0", "eth1"]);
        assert_eq!(args.iface_regex[0].as_str(), "^10\\.[0-9]{1,3}\\.");
        assert_eq!(args.subnet_file.to_str(), Some("/from/the/command/line"));
        assert!(args.ip_masq && !args.iptables_forward_rules);
        assert_eq!(args.public_ip, None);
        assert_eq!(
            (args.io, args.pin, args.busy_poll),
            (IoMode::Uring, true, Duration::from_micros(30))
        );
        assert!(!run("-pin=false").pin);
        assert!(!args.offload && run("-offload").offload);
        let Invocation {
            registry, verbosity, ..
        } = invocation("leases list -registry-dir /srv/r").unwrap();
        assert_eq!(registry.registry_dir.unwrap().to_str(), Some("/srv/r"));
        assert_eq!(
            registry.etcd_endpoints,
            ["http://192.0.2.1:2379", "http://192.0.2.2:2379"]
        );
        assert_eq!(registry.etcd_password.unwrap().expose(), "s3cret");
        assert_eq!(verbosity, 7);
        assert_eq!(invocation("").unwrap().registry.registry_dir, None);
    }

    #[test]
    fn an_offload_flag_on_the_command_line_wins_over_either_variable() {
        let name = "an_offload_flag_on_the_command_line_wins_over_either_variable";
        if !is_child(name, &[("FLANNELD_OFFLOAD", "true"), ("FLANNELD_NO_OFFLOAD", "true")]) {
            return;
        }
        assert!(error("").contains("FLANNELD_OFFLOAD and FLANNELD_NO_OFFLOAD contradict each other"));
        assert!(error("-offload -no-offload").contains("--offload=true and --no-offload contradict each other"));
        assert!(!run("-no-offload").offload);
        assert!(!run("-offload=false").offload);
        assert!(run("-offload").offload);
        assert!(run("-no-offload=false").offload);
        // Its business is another one.
        assert!(invocation("leases list").is_ok());
    }
}
