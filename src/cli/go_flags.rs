//! Command lines as Go's `flag` package reads them, turned into what clap reads.
//!
//! The original's users write `-etcd-endpoints=…`, and so do the service files of distributions; to clap that is a cluster
//! of short flags. What differs, besides the single dash:
//! - A flag that takes a value takes the next word whatever it looks like, also `-x`.
//! - A boolean never takes the next word: it is bare or `=true`. (That is clap's business; see [`as_go_boolean`].)
//! - A flag with an empty value (`-iface=$IFACE` in a service file, with no such variable) is the same as no flag. Go's
//!   empty defaults make it so for the original.

use std::ffi::{OsStr, OsString};

use clap::{Arg, Command};

/// Rewrites a command line, the program's name first, for `command`.
///
/// `flanneld run` is `flanneld`: the word `run` is dropped where a subcommand would stand.
pub(super) fn rewrite(command: &Command, args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut args = args.into_iter();
    let mut rewritten: Vec<OsString> = args.next().into_iter().collect();
    // The command and its subcommands as they are named; the last one's flags are looked up first.
    let mut commands = vec![command];
    let mut words = 0;
    while let Some(arg) = args.next() {
        let Some((dashes, name, value)) = arg.to_str().and_then(split) else {
            words += 1;
            if words == 1 && arg == "run" {
                continue;
            }
            commands.extend(commands.last().and_then(|command| command.find_subcommand(&arg)));
            rewritten.push(arg);
            continue;
        };
        if name.is_empty() {
            // `--`: no flags after it.
            rewritten.push(arg);
            rewritten.extend(args);
            break;
        }
        let known = commands
            .iter()
            .rev()
            .find_map(|command| command.get_arguments().find(|known| known.get_long() == Some(name)));
        match (known, value) {
            (Some(known), None) if takes_a_word(known) => match args.next() {
                Some(word) if word.is_empty() => {}
                Some(word) => rewritten.push(joined(name, &word)),
                None => rewritten.push(format!("--{name}").into()),
            },
            (Some(_), Some("")) => {}
            (Some(_), Some(value)) => rewritten.push(joined(name, OsStr::new(value))),
            (Some(_), None) => rewritten.push(format!("--{name}").into()),
            // clap adds these two by itself; they are asked for, or they are not.
            (None, value) if matches!(name, "help" | "version") => {
                if value.is_none_or(|value| boolean(value) != Ok(false)) {
                    rewritten.push(format!("--{name}").into());
                }
            }
            // `-icf FILE`: flags that are only short ones, as of a script, stand together.
            (None, _) if dashes == 1 && commands.last().is_some_and(|command| begins_short(command, name)) => {
                rewritten.push(arg);
            }
            // Two dashes get a misspelt flag a message with the one that was meant; `-h` is clap's own.
            (None, _) if dashes == 1 && name.len() > 1 => rewritten.push(format!("-{}", arg.to_string_lossy()).into()),
            (None, _) => rewritten.push(arg),
        }
    }
    rewritten
}

/// A flag's dashes, name and value; `None`: it is a word. `-` alone is one, and so is a negative number.
fn split(arg: &str) -> Option<(usize, &str, Option<&str>)> {
    let (dashes, rest) = match arg.strip_prefix("--") {
        Some(rest) => (2, rest),
        None => (
            1,
            arg.strip_prefix('-')
                .filter(|rest| rest.starts_with(|c: char| c.is_ascii_alphabetic()))?,
        ),
    };
    match rest.split_once('=') {
        Some((name, value)) => Some((dashes, name, Some(value))),
        None => Some((dashes, rest, None)),
    }
}

fn takes_a_word(arg: &Arg) -> bool {
    arg.get_action().takes_values() && !arg.is_require_equals_set()
}

/// Whether the name begins with a flag that has no long form.
fn begins_short(command: &Command, name: &str) -> bool {
    let mut arguments = command.get_arguments();
    arguments.any(|arg| arg.get_long().is_none() && arg.get_short() == name.chars().next())
}

fn joined(name: &str, value: &OsStr) -> OsString {
    let mut joined = OsString::from(format!("--{name}="));
    joined.push(value);
    joined
}

/// What the help calls the value of a boolean flag, and what [`as_go_boolean`] knows one by.
pub(super) const BOOL: &str = "BOOL";

/// Gives a flag whose value is a [`BOOL`] Go's form: bare, or with `=` and a value, but never with a value behind a space.
pub(super) fn as_go_boolean(arg: Arg) -> Arg {
    let is_boolean = arg.get_value_names().is_some_and(|names| names == [BOOL]);
    if is_boolean {
        arg.num_args(0..=1).require_equals(true).default_missing_value("true")
    } else {
        arg
    }
}

/// A boolean in each of the spellings of Go's `strconv.ParseBool`.
pub(super) fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("write true or false".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::ArgAction;

    use super::*;

    fn command() -> Command {
        let value = |name: &'static str| Arg::new(name).long(name).action(ArgAction::Append);
        let boolean = |name: &'static str| Arg::new(name).long(name).num_args(0..=1).require_equals(true);
        Command::new("flanneld")
            .arg(value("etcd-endpoints"))
            .arg(value("v").short('v'))
            .arg(boolean("ip-masq"))
            .subcommand(
                Command::new("docker-opts")
                    .arg(Arg::new("file").short('f'))
                    .arg(Arg::new("individual").short('i').action(ArgAction::SetTrue)),
            )
            .subcommand(
                Command::new("network").subcommand(
                    Command::new("set")
                        .arg(Arg::new("json"))
                        .arg(value("subnet-len"))
                        .arg(Arg::new("force").long("force").action(ArgAction::SetTrue)),
                ),
            )
    }

    #[track_caller]
    fn check(line: &str, expected: &str) {
        let rewritten = rewrite(&command(), format!("flanneld {line}").split(' ').map(OsString::from));
        let rewritten: Vec<&str> = rewritten[1..].iter().map(|word| word.to_str().unwrap()).collect();
        assert_eq!(rewritten.join(" "), expected, "{line}");
    }

    #[test]
    fn one_dash_and_two_space_and_equals_are_the_same() {
        for line in [
            "-etcd-endpoints=x",
            "--etcd-endpoints=x",
            "-etcd-endpoints x",
            "--etcd-endpoints x",
        ] {
            check(line, "--etcd-endpoints=x");
        }
        for line in ["-v=5", "-v 5", "--v=5", "--v 5"] {
            check(line, "--v=5");
        }
    }

    #[test]
    fn a_value_may_look_like_a_flag_or_a_subcommand() {
        check("-etcd-endpoints -v -v -1", "--etcd-endpoints=-v --v=-1");
        check(
            "-etcd-endpoints a=b -etcd-endpoints=c=d",
            "--etcd-endpoints=a=b --etcd-endpoints=c=d",
        );
        check("-etcd-endpoints network -v run", "--etcd-endpoints=network --v=run");
    }

    #[test]
    fn a_boolean_does_not_take_the_next_word() {
        check("-ip-masq network", "--ip-masq network");
        check("-ip-masq=false -v 1", "--ip-masq=false --v=1");
    }

    #[test]
    fn short_flags_of_a_subcommand_stand_alone_or_together() {
        for line in ["docker-opts -i -f /x", "docker-opts -if /x", "docker-opts -f/x -i"] {
            check(line, line);
        }
        check("docker-opts -ignored", "docker-opts -ignored");
        check(
            "docker-opts -etcd-endpoints x -v 3",
            "docker-opts --etcd-endpoints=x --v=3",
        );
        check("-if network", "--if network");
    }

    #[test]
    fn an_empty_value_is_no_flag() {
        check("-etcd-endpoints= -v 1", "--v=1");
        check("-etcd-endpoints  -ip-masq=", "");
    }

    #[test]
    fn run_is_dropped_once_and_only_as_the_first_word() {
        check("run -v 1", "--v=1");
        check("-v 1 run", "--v=1");
        check("run run", "run");
        check("network run", "network run");
    }

    #[test]
    fn subcommands_have_their_own_flags_and_those_of_the_commands_around_them() {
        check(
            "network set - -subnet-len 20 -force -v 5",
            "network set - --subnet-len=20 --force --v=5",
        );
        check("-subnet-len 20", "--subnet-len 20");
    }

    #[test]
    fn help_and_version_have_one_dash_too() {
        check("-help", "--help");
        check("-version", "--version");
        check("-version=true -version=false", "--version");
        check("-h", "-h");
    }

    #[test]
    fn unknown_flags_are_left_for_clap_to_complain_about() {
        check("-etcd-endpoint=x --other", "--etcd-endpoint=x --other");
        check("-x -1 -", "-x -1 -");
    }

    #[test]
    fn nothing_is_changed_after_two_dashes() {
        check("-v 1 -- -v 2 run", "--v=1 -- -v 2 run");
    }

    #[test]
    fn a_flag_without_its_value_is_left_to_clap() {
        check("-etcd-endpoints", "--etcd-endpoints");
    }

    #[test]
    fn booleans_are_gos() {
        assert_eq!(["1", "t", "TRUE", "True"].map(boolean), [const { Ok(true) }; 4]);
        assert_eq!(["0", "F", "false", "False"].map(boolean), [const { Ok(false) }; 4]);
        assert!(["", "yes", "tRUE", "2"].into_iter().all(|text| boolean(text).is_err()));
    }
}
