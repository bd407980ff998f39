//! Hostfiles and the choice of hosts and slots, as DeepSpeed writes them. Text in, values out.
//!
//! A slot is a place for one rank on a host. Stricter than DeepSpeed where it would guess: a host that a filter names
//! twice, and words after `slots=N`, are refused.

use crate::cli::{failure, usage};
use anyhow::Result;

/// A host and the slots to use on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its name or address.
    pub name: String,
    /// Ascending and without duplicates; never empty.
    pub slots: Vec<usize>,
    /// How many slots it has, used or not.
    pub of: usize,
}

impl Host {
    /// A host with all of its slots.
    pub fn whole(name: &str, slots: usize) -> Self {
        Self {
            name: name.to_owned(),
            slots: (0..slots).collect(),
            of: slots,
        }
    }

    /// Whether the slots in use are the first ones.
    pub fn uses_first(&self) -> bool {
        self.slots.iter().copied().eq(0..self.slots.len())
    }
}

/// Parses a hostfile: `host slots=N` a line, `#` before a comment.
///
/// # Errors
/// Names the file and the line.
pub fn parse(text: &str, file: &str) -> Result<Vec<Host>> {
    let mut hosts: Vec<Host> = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let refuse = |problem: String| {
            let hint = "a line is a host and its number of ranks: worker-1 slots=4";
            Err(failure(format!("{file}:{}: {problem}", at + 1), hint))
        };
        let line = line.split('#').next().unwrap_or("").trim();
        let words: Vec<&str> = line.split_whitespace().collect();
        let (name, slots) = match words.as_slice() {
            [] => continue,
            [name, slots] => (*name, slots.strip_prefix("slots=")),
            _ => return refuse(format!("'{line}' is not `host slots=N`")),
        };
        let Some(slots) = slots.and_then(|count| count.parse().ok()) else {
            return refuse(format!("'{line}' is not `host slots=N`"));
        };
        if name.contains(['@', ':', ',']) {
            return refuse(format!("'{name}' is not the name of a host"));
        }
        if slots == 0 {
            return refuse(format!("host '{name}' has no slots"));
        }
        if hosts.iter().any(|host| host.name == name) {
            return refuse(format!("host '{name}' is there twice"));
        }
        hosts.push(Host::whole(name, slots));
    }
    if hosts.is_empty() {
        let hint = "write one line for each host: worker-1 slots=4";
        return Err(failure(format!("{file} names no host"), hint));
    }
    Ok(hosts)
}

/// Which way a filter works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Only what it names.
    Include,
    /// All but what it names.
    Exclude,
}

impl Filter {
    fn flag(self) -> &'static str {
        match self {
            Filter::Include => "--include",
            Filter::Exclude => "--exclude",
        }
    }

    /// Applies `host1@host2:0,2`: all of host 1 and two slots of host 2. The order of the hosts stays.
    ///
    /// # Errors
    /// If it names hosts or slots that are not there, or leaves none.
    pub fn apply(self, hosts: &[Host], text: &str) -> Result<Vec<Host>> {
        let flag = self.flag();
        let refuse = |problem: String, hint: String| Err(usage(format!("{flag}: {problem}"), hint));
        let mut named: Vec<(usize, Vec<usize>)> = Vec::new();
        for part in text.split('@') {
            let (name, list) = match part.split_once(':') {
                Some((name, list)) => (name, Some(list)),
                None => (part, None),
            };
            let Some(at) = hosts.iter().position(|host| host.name == name) else {
                let names: Vec<&str> = hosts.iter().map(|host| host.name.as_str()).collect();
                return refuse(
                    format!("there is no host '{name}'"),
                    format!("the hosts are {}", names.join(", ")),
                );
            };
            if named.iter().any(|(other, _)| *other == at) {
                let hint = format!("name all slots at once: {name}:0,1");
                return refuse(format!("host '{name}' is named twice"), hint);
            }
            let host = &hosts[at];
            let mut slots = Vec::new();
            for slot in list.into_iter().flat_map(|list| list.split(',')) {
                let number = slot.parse().ok();
                let Some(number) = number.filter(|number| host.slots.contains(number)) else {
                    let last = host.of - 1;
                    let hint = format!("its slots are 0 to {last}: {name}:0,{last}");
                    return refuse(format!("host '{name}' has no slot '{slot}'"), hint);
                };
                slots.push(number);
            }
            slots.sort_unstable();
            slots.dedup();
            let all = || host.slots.clone();
            named.push((at, if list.is_some() { slots } else { all() }));
        }
        let chosen = hosts.iter().enumerate().map(|(at, host)| {
            let named = named.iter().find(|(other, _)| *other == at);
            let is_named = |slot: &usize| named.is_some_and(|(_, slots)| slots.contains(slot));
            let keep = |slot: &usize| is_named(slot) == (self == Filter::Include);
            let slots = host.slots.iter().copied().filter(keep).collect();
            let (name, of) = (host.name.clone(), host.of);
            Host { name, slots, of }
        });
        let chosen: Vec<Host> = chosen.filter(|host| !host.slots.is_empty()).collect();
        if chosen.is_empty() {
            return refuse("no slot is left".to_owned(), "exclude fewer".to_owned());
        }
        Ok(chosen)
    }
}

/// The first `nodes` hosts, with the first `ranks` slots of each.
///
/// # Errors
/// If there are not as many.
pub fn limit(hosts: Vec<Host>, nodes: Option<usize>, ranks: Option<usize>) -> Result<Vec<Host>> {
    let mut hosts = hosts;
    if let Some(nodes) = nodes {
        if nodes == 0 || nodes > hosts.len() {
            let hint = format!("the number of hosts is {}", hosts.len());
            return Err(usage(format!("--num-nodes {nodes}"), hint));
        }
        hosts.truncate(nodes);
    }
    if let Some(ranks) = ranks {
        for host in &mut hosts {
            if ranks == 0 || ranks > host.slots.len() {
                let hint = format!("host '{}' has {} slots", host.name, host.slots.len());
                return Err(usage(format!("--num-ranks {ranks}"), hint));
            }
            host.slots.truncate(ranks);
        }
    }
    Ok(hosts)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str =
        "# our cluster\n\nworker-0 slots=2\n  worker-1\tslots=4  # the new one\n10.0.0.3 slots=1\n";

    /// Hosts as `name:slot,slot/of`.
    fn shown(hosts: &[Host]) -> String {
        let one = |host: &Host| {
            let slots: Vec<String> = host.slots.iter().map(usize::to_string).collect();
            format!("{}:{}/{}", host.name, slots.join(","), host.of)
        };
        hosts.iter().map(one).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn hostfiles_are_read_or_refused_by_line() {
        let hosts = parse(FILE, "hosts").unwrap();
        assert_eq!(
            shown(&hosts),
            "worker-0:0,1/2 worker-1:0,1,2,3/4 10.0.0.3:0/1"
        );
        for (text, message) in [
            ("a slots=1\nb\n", "hosts:2: 'b' is not `host slots=N`"),
            ("a slots=x", "hosts:1: 'a slots=x' is not `host slots=N`"),
            ("a slots=-1", "hosts:1: 'a slots=-1' is not `host slots=N`"),
            ("a slot=1", "hosts:1: 'a slot=1' is not `host slots=N`"),
            (
                "a slots=1 max_slots=2",
                "hosts:1: 'a slots=1 max_slots=2' is not `host slots=N`",
            ),
            ("a slots=0", "hosts:1: host 'a' has no slots"),
            ("a:1 slots=1", "hosts:1: 'a:1' is not the name of a host"),
            ("a slots=1\n\na slots=2", "hosts:3: host 'a' is there twice"),
            ("# nothing\n", "hosts names no host"),
        ] {
            assert_eq!(parse(text, "hosts").unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn filters_choose_hosts_and_slots() {
        let hosts = parse(FILE, "hosts").unwrap();
        for (filter, text, expected) in [
            (Filter::Include, "worker-1", Ok("worker-1:0,1,2,3/4")),
            (Filter::Include, "worker-1:0,2", Ok("worker-1:0,2/4")),
            (Filter::Include, "worker-1:2,0,2", Ok("worker-1:0,2/4")),
            (
                Filter::Include,
                "worker-1:3@worker-0",
                Ok("worker-0:0,1/2 worker-1:3/4"),
            ),
            (
                Filter::Exclude,
                "worker-1:0",
                Ok("worker-0:0,1/2 worker-1:1,2,3/4 10.0.0.3:0/1"),
            ),
            (
                Filter::Exclude,
                "worker-0@10.0.0.3:0",
                Ok("worker-1:0,1,2,3/4"),
            ),
            (
                Filter::Exclude,
                "worker-0:0,1@10.0.0.3",
                Ok("worker-1:0,1,2,3/4"),
            ),
            (
                Filter::Include,
                "worker-7",
                Err("--include: there is no host 'worker-7'"),
            ),
            (Filter::Exclude, "", Err("--exclude: there is no host ''")),
            (
                Filter::Include,
                "worker-0:2",
                Err("--include: host 'worker-0' has no slot '2'"),
            ),
            (
                Filter::Include,
                "worker-0:",
                Err("--include: host 'worker-0' has no slot ''"),
            ),
            (
                Filter::Include,
                "worker-0:a",
                Err("--include: host 'worker-0' has no slot 'a'"),
            ),
            (
                Filter::Include,
                "worker-0:0@worker-0:1",
                Err("--include: host 'worker-0' is named twice"),
            ),
            (
                Filter::Exclude,
                "worker-0@worker-1@10.0.0.3",
                Err("--exclude: no slot is left"),
            ),
        ] {
            let chosen = filter.apply(&hosts, text).map(|hosts| shown(&hosts));
            let chosen = chosen.map_err(|error| error.to_string());
            let expected = expected.map(str::to_owned).map_err(str::to_owned);
            assert_eq!(chosen, expected, "{filter:?} {text}");
        }
    }

    #[test]
    fn limits_keep_the_first_ones() {
        let hosts = || parse("a slots=4\nb slots=2", "hosts").unwrap();
        for (nodes, ranks, expected) in [
            (None, None, Ok("a:0,1,2,3/4 b:0,1/2")),
            (Some(1), None, Ok("a:0,1,2,3/4")),
            (None, Some(2), Ok("a:0,1/4 b:0,1/2")),
            (Some(1), Some(3), Ok("a:0,1,2/4")),
            (Some(3), None, Err("--num-nodes 3")),
            (Some(0), None, Err("--num-nodes 0")),
            (None, Some(3), Err("--num-ranks 3")),
            (None, Some(0), Err("--num-ranks 0")),
        ] {
            let limited = limit(hosts(), nodes, ranks).map(|hosts| shown(&hosts));
            let limited = limited.map_err(|error| error.to_string());
            let expected = expected.map(str::to_owned).map_err(str::to_owned);
            assert_eq!(limited, expected, "{nodes:?} {ranks:?}");
        }
    }
}
