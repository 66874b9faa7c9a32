//! This process's command line, as others see it (`ps`, `/proc/<pid>/cmdline`): it lies in memory that may be written to.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
};

/// What each byte of a hidden text becomes. (`ps` shows bytes that are 0 as spaces, and the end as the end.)
const MASK: u8 = b'*';

/// Masks `secret` wherever it is an argument or the end of one.
///
/// # Errors
/// When the system does not show, or does not let change, where the arguments are.
pub fn hide(secret: &str) -> io::Result<()> {
    if secret.is_empty() {
        return Ok(());
    }
    let line = fs::read("/proc/self/cmdline")?;
    let start = start()?;
    // Through this file and not by a pointer, which nothing in this program was given.
    let memory = File::options().write(true).open("/proc/self/mem")?;
    for range in places(&line, secret.as_bytes()) {
        memory.write_all_at(&vec![MASK; range.len()], start + range.start as u64)?;
    }
    Ok(())
}

/// Where the arguments begin: field 48 of `/proc/self/stat` (proc_pid_stat(5)).
fn start() -> io::Result<u64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    // The second field is the program's name, in brackets, in which there may be anything.
    let behind_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let start = behind_name.split_whitespace().nth(48 - 3);
    // 0: this process may not know.
    start
        .and_then(|field| field.parse().ok())
        .filter(|start| *start != 0)
        .ok_or_else(|| io::Error::other("/proc/self/stat does not tell where the arguments are"))
}

/// Where `secret` is in a line of arguments that end with 0 each.
fn places(line: &[u8], secret: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut end = 0;
    line.split_inclusive(|&byte| byte == 0)
        .filter_map(|argument| {
            let start = end;
            end += argument.len();
            let argument = argument.strip_suffix(&[0]).unwrap_or(argument);
            let rest = argument.strip_suffix(secret)?;
            // A whole argument, or the value behind a flag's name.
            let is_value = rest.is_empty() || (rest.starts_with(b"-") && rest.ends_with(b"="));
            is_value.then(|| start + rest.len()..start + argument.len())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_found_as_an_argument_and_behind_its_flag() {
        let line = b"flanneld\0-etcd-password=open\0--etcd-password\0open\0-iface=reopen\0open-x\0";
        let found: Vec<&[u8]> = places(line, b"open").into_iter().map(|range| &line[range]).collect();
        assert_eq!(found, [b"open"; 2]);
        assert_eq!(
            places(line, b"open")
                .iter()
                .map(|range| range.start)
                .collect::<Vec<_>>(),
            [24, 45]
        );
        assert!(places(b"flanneld\0", b"open").is_empty());
        assert!(places(b"", b"open").is_empty());
    }
}
