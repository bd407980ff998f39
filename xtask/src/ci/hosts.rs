//! Two hosts for the length of a check: network namespaces joined by a cable, each with a host name of its own. They
//! share the file system and nothing else that Open MPI uses: its messages go over TCP.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use super::mpi::succeed;

/// A network for examples (RFC 5737): it is nowhere else.
const NETWORK: &str = "192.0.2.0/24";
const ADDRESSES: [&str; 2] = ["192.0.2.1", "192.0.2.2"];

/// The two hosts; dropping them takes them away.
pub struct Hosts {
    names: [String; 2],
    folder: PathBuf,
}

impl Hosts {
    /// Makes them.
    ///
    /// # Errors
    /// Where the system does not let this user.
    pub fn new() -> anyhow::Result<Self> {
        let id = std::process::id();
        // The names of interfaces have up to 15 characters.
        let hosts = Hosts {
            names: ["a", "b"].map(|letter| format!("wl{id}{letter}")),
            folder: std::env::temp_dir().join(format!("windlass-hosts-{id}")),
        };
        hosts.build().context(
            "cannot make network namespaces (they need CAP_NET_ADMIN and CAP_SYS_ADMIN); \
             set WINDLASS_CI_SKIP=hosts where that cannot be had",
        )?;
        Ok(hosts)
    }

    fn build(&self) -> anyhow::Result<()> {
        let [first, second] = &self.names;
        for name in &self.names {
            succeed("ip", &["netns", "add", name])?;
        }
        // A cable's ends are named as their hosts.
        let cable = ["link", "add", first, "netns", first, "type", "veth"];
        succeed(
            "ip",
            &[&cable[..], &["peer", "name", second, "netns", second]].concat(),
        )?;
        for (name, address) in self.names.iter().zip(ADDRESSES) {
            let address = format!("{address}/24");
            succeed("ip", &["-n", name, "address", "add", &address, "dev", name])?;
            succeed("ip", &["-n", name, "link", "set", name, "up"])?;
            succeed("ip", &["-n", name, "link", "set", "lo", "up"])?;
        }
        std::fs::create_dir_all(&self.folder)?;
        let agent = self.agent();
        // Open MPI calls it as it would call ssh: with a host and a command for its shell.
        let script = format!(
            "#!/bin/sh\nshift\nexec ip netns exec {second} unshare --uts \
             sh -c 'hostname {second}; exec sh -c \"$1\"' sh \"$*\"\n"
        );
        std::fs::write(&agent, script)?;
        std::fs::set_permissions(&agent, std::fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    fn agent(&self) -> PathBuf {
        self.folder.join("agent")
    }

    /// A command on the first host.
    pub fn on_first(&self, folder: &Path, words: &[&str]) -> Command {
        let first = &self.names[0];
        let named = format!("hostname {first}; exec \"$@\"");
        let mut command = Command::new("ip");
        command.args([
            "netns", "exec", first, "unshare", "--uts", "sh", "-c", &named, "sh",
        ]);
        command.args(words).current_dir(folder);
        command
    }

    /// Words for Open MPI's mpirun on the first host, by which ranks on the second one are started and reached.
    pub fn network(&self) -> Vec<String> {
        let agent = self.agent().display().to_string();
        let settings = [
            ("plm_rsh_agent", agent.as_str()),
            ("btl", "tcp,self"),
            ("btl_tcp_if_include", NETWORK),
            ("oob_tcp_if_include", NETWORK),
        ];
        let words = settings
            .iter()
            .flat_map(|(key, value)| ["--mca", key, value]);
        words.map(str::to_owned).collect()
    }

    /// The addresses of the hosts.
    pub fn addresses(&self) -> [&'static str; 2] {
        ADDRESSES
    }

    /// A program as so many ranks, half of them on each host.
    pub fn mpirun(&self, folder: &Path, ranks: usize, program: &[&str]) -> Command {
        let places = self
            .addresses()
            .map(|address| format!("{address}:{}", ranks / 2));
        let (places, ranks, network) = (places.join(","), ranks.to_string(), self.network());
        let mut words = vec![
            "mpirun",
            "--allow-run-as-root",
            "-n",
            &ranks,
            "-host",
            &places,
        ];
        words.extend(["--oversubscribe", "--bind-to", "none"]);
        words.extend(network.iter().map(String::as_str));
        words.extend(program);
        self.on_first(folder, &words)
    }

    /// Bytes that have left the first host over the cable.
    pub fn bytes_sent(&self) -> anyhow::Result<u64> {
        let counter = format!("/sys/class/net/{}/statistics/tx_bytes", self.names[0]);
        let mut read = self.on_first(Path::new("/"), &["cat", &counter]);
        let output = read.output()?;
        let text = String::from_utf8(output.stdout)?;
        text.trim().parse().with_context(|| counter)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        // What was not made cannot be taken away; either way nothing is left.
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "delete", name]).output();
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
