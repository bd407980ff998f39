//! Programs that a check needs, installed where that is possible: Debian, as root.

use std::process::Command;

fn present(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Installs the packages of programs that are missing, with more flags of apt-get; the programs that are missing still.
pub fn install<'a>(needs: &[(&'a str, &[&'a str])], flags: &[&str]) -> Vec<&'a str> {
    let missing = || needs.iter().filter(|(program, _)| !present(program));
    let packages: Vec<&str> = missing()
        .flat_map(|(_, packages)| packages.iter().copied())
        .collect();
    if packages.is_empty() {
        return Vec::new();
    }
    println!("installing {}", packages.join(" "));
    for arguments in [
        &["update", "--quiet"][..],
        &[&["install", "--yes", "--quiet"], flags, &packages[..]].concat(),
    ] {
        let mut apt = Command::new("apt-get");
        apt.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
        // Whether it worked shows below.
        let _ = apt.status();
    }
    missing().map(|(program, _)| *program).collect()
}
