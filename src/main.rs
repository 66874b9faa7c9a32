//! `flanneld`: arguments in, exit code out. Everything else is in the library.

use std::{env, process::ExitCode};

use flannel::cli;

fn main() -> ExitCode {
    match cli::parse(env::args_os()) {
        Ok(invocation) => cli::execute(invocation),
        Err(error) => error.exit(),
    }
}
