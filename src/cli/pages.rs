//! `flanneld man` and `flanneld completions`: what packages install beside the program, made from the definition of the
//! command line.

use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
};

use clap::{Args, Command};
use clap_complete::Shell;
use clap_mangen::Man;

/// Manual pages of daemons and administrators' programs are in section 8.
const SECTION: &str = "8";

/// `flanneld man`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct ManArgs {
    /// Write the pages of all subcommands, too, into this directory, instead of the first one to standard output
    #[arg(value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// `flanneld completions`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct CompletionsArgs {
    /// Whose language to write them in
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

/// Writes the manual.
///
/// # Errors
/// When a file, or `out`, cannot be written.
pub fn man(args: &ManArgs, command: Command, out: &mut impl Write) -> io::Result<()> {
    // Without each page saying what `help` does.
    let mut command = command.disable_help_subcommand(true);
    // Gives the subcommands their full names, `flanneld-network-set`.
    command.build();
    let Some(dir) = &args.dir else {
        return Man::new(command).section(SECTION).render(out);
    };
    fs::create_dir_all(dir)?;
    let mut rest = vec![command];
    while let Some(command) = rest.pop() {
        rest.extend(command.get_subcommands().filter(|sub| !sub.is_hide_set()).cloned());
        let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
        let mut page = Vec::new();
        Man::new(command).section(SECTION).render(&mut page)?;
        fs::write(dir.join(format!("{name}.{SECTION}")), page)?;
    }
    Ok(())
}

/// Writes a shell's completions.
///
/// # Errors
/// When `out` cannot be written.
pub fn completions(args: &CompletionsArgs, mut command: Command, out: &mut impl Write) -> io::Result<()> {
    let name = command.get_name().to_owned();
    // The generator panics when it cannot write.
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, name, &mut text);
    out.write_all(&text)
}

#[cfg(test)]
mod tests {
    use std::{env, process};

    use clap::ValueEnum;

    use super::{super::command, *};

    #[test]
    fn each_subcommand_has_a_page_that_names_its_flags() {
        let dir = env::temp_dir().join(format!("flannel-man-{}", process::id()));
        let args = ManArgs { dir: Some(dir.clone()) };
        man(&args, command(), &mut Vec::new()).unwrap();
        for (page, flag) in [
            ("flanneld", "etcd\\-endpoints"),
            ("flanneld-network-set", "subnet\\-len"),
            ("flanneld-leases-reserve", "public\\-ip"),
            ("flanneld-docker-opts", "\\-k"),
        ] {
            let text = fs::read_to_string(dir.join(format!("{page}.8"))).unwrap();
            assert!(text.contains(&format!(".TH {page} 8")), "{page}: {text}");
            assert!(text.contains(flag), "{page}: {text}");
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn the_first_page_goes_to_standard_output() {
        let mut page = Vec::new();
        man(&ManArgs { dir: None }, command(), &mut page).unwrap();
        let page = String::from_utf8(page).unwrap();
        assert!(
            page.contains(".SH NAME\nflanneld") && page.contains("ip\\-masq"),
            "{page}"
        );
    }

    #[test]
    fn each_shell_has_completions() {
        for shell in Shell::value_variants() {
            let mut text = Vec::new();
            completions(&CompletionsArgs { shell: *shell }, command(), &mut text).unwrap();
            let text = String::from_utf8(text).unwrap();
            assert!(
                text.contains("docker-opts") && text.contains("etcd-endpoints"),
                "{shell}"
            );
        }
    }
}
