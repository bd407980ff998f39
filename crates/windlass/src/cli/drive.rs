//! A training run at the terminal: progress, Ctrl-C, sizes in words.

use super::observe::Observer;
use anyhow::Result;
use std::cell::RefCell;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use windlass::progress::{Progress, say};
use windlass::tensor::kernels::memory::Memory;
use windlass::train::{End, Event, Trainer};

/// Raised by Ctrl-C.
static STOP: AtomicBool = AtomicBool::new(false);

/// Lets Ctrl-C end the run after the current step; a second one ends the program.
fn listen() -> Result<()> {
    static LISTENING: AtomicBool = AtomicBool::new(false);
    if LISTENING.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\nstopping after this step; once more to stop at once");
    })?;
    Ok(())
}

/// Runs a trainer to its end, behind a progress bar on the rank that has an observer. Ctrl-C saves a checkpoint and ends the
/// program well.
///
/// # Errors
/// Those of the run.
pub fn train(trainer: &mut Trainer, steps: u64, observer: Option<Observer>) -> Result<()> {
    let Some(mut observer) = observer else {
        trainer.run(&STOP, &mut |_| ())?;
        return Ok(());
    };
    listen()?;
    let memory = trainer.cpu().memory.clone();
    let mut bar = Progress::new(steps, "training");
    let mut last = String::new();
    let mut speed = 0.0;
    let end = trainer.run(&STOP, &mut |event| match event {
        Event::Step(s) => {
            let now = s.tokens as f64 / s.seconds;
            speed = if speed == 0.0 {
                now
            } else {
                0.9 * speed + 0.1 * now
            };
            let held = bytes(memory.now().reserved);
            last = format!("loss {:.3} · {speed:.0} tokens/s · {held}", s.loss);
            bar.set(s.step, &last);
            for line in observer.step(&s) {
                bar.note(&line);
            }
        }
        Event::Evaluated {
            step,
            loss,
            perplexity,
        } => bar.note(&evaluated(step, loss, perplexity)),
        Event::Profiled(layers) => {
            for line in observer.profile(layers) {
                bar.note(&line);
            }
        }
        Event::Best { .. } => {}
        Event::Saved(path) => bar.note(&format!("saved {}", path.display())),
    })?;
    match end {
        End::Finished | End::Stopped => bar.finish(&last),
        End::Interrupted => {
            bar.finish("interrupted");
            eprintln!("continue with the same command and --resume");
        }
    }
    for line in observer.end() {
        say(&line);
    }
    Ok(())
}

/// Sees a trainer, with what shows a text.
pub type Look<'a> = &'a mut dyn FnMut(&Trainer, &mut dyn FnMut(&str));

/// Runs a trainer that fine-tunes to its end, as [`train`]. `look` sees it after every evaluation, with what shows a text; in
/// `shared` are the weights that ranks have in common.
///
/// # Errors
/// Those of the run.
pub fn tune(
    trainer: &mut Trainer,
    steps: u64,
    observer: Option<Observer>,
    shared: &Memory,
    look: Look<'_>,
) -> Result<()> {
    let Some(mut observer) = observer else {
        let look = &mut |trainer: &Trainer| look(trainer, &mut |_| ());
        trainer.run_watched(&STOP, &mut |_| (), look)?;
        return Ok(());
    };
    listen()?;
    let (memory, shared) = (trainer.cpu().memory.clone(), shared.now().reserved);
    let bar = RefCell::new(Progress::new(steps, "tuning"));
    let (mut last, mut speed) = (String::new(), 0.0);
    let mut tell = |event| match event {
        Event::Step(s) => {
            let now = s.tokens as f64 / s.seconds;
            speed = if speed == 0.0 {
                now
            } else {
                0.9 * speed + 0.1 * now
            };
            let held = bytes(shared + memory.now().reserved);
            let rewards = s.rewards.map_or(String::new(), |rewards| {
                let means = rewards.means();
                format!(
                    " · margin {:.3} · right {:.0} %",
                    means[2].1,
                    100.0 * means[3].1
                )
            });
            last = format!("loss {:.3}{rewards} · {speed:.0} tokens/s · {held}", s.loss);
            bar.borrow_mut().set(s.step, &last);
            for line in observer.step(&s) {
                bar.borrow().note(&line);
            }
        }
        Event::Evaluated {
            step,
            loss,
            perplexity,
        } => bar.borrow().note(&evaluated(step, loss, perplexity)),
        Event::Profiled(layers) => {
            for line in observer.profile(layers) {
                bar.borrow().note(&line);
            }
        }
        Event::Best { .. } => {}
        Event::Saved(path) => bar.borrow().note(&format!("saved {}", path.display())),
    };
    let mut show = |trainer: &Trainer| look(trainer, &mut |text| bar.borrow().note(text));
    let end = trainer.run_watched(&STOP, &mut tell, &mut show)?;
    let bar = bar.into_inner();
    match end {
        End::Finished => bar.finish(&last),
        End::Stopped => bar.finish("stopped: the held-out loss falls no more"),
        End::Interrupted => {
            bar.finish("interrupted");
            say("continue with the same command and --resume");
        }
    }
    for line in observer.end() {
        say(&line);
    }
    Ok(())
}

/// Bytes in words.
pub fn bytes(n: usize) -> String {
    match n as f64 {
        n if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        n if n >= 1e6 => format!("{:.1} MB", n / 1e6),
        n => format!("{:.1} kB", n / 1e3),
    }
}

/// A count in words.
pub fn count(n: usize) -> String {
    match n as f64 {
        n if n >= 1e9 => format!("{:.2} B", n / 1e9),
        n if n >= 1e6 => format!("{:.1} M", n / 1e6),
        n => format!("{n}"),
    }
}

/// Bytes of memory that this program can still get: what the system has left, or a control group that it is in, if that
/// is less; `None` where the system does not say.
pub fn machine_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))?;
    let kib: usize = line.split_whitespace().nth(1)?.parse().ok()?;
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    let root = Path::new("/sys/fs/cgroup");
    let folders = root.join(group.unwrap_or_default());
    let folders = folders
        .ancestors()
        .take_while(|folder| folder.starts_with(root));
    folders.filter_map(group_memory).chain([kib * 1024]).min()
}

/// Bytes that a control group (version 2) leaves its programs; `None` where it has no limit. What is only the cache of
/// files is left too.
fn group_memory(folder: &Path) -> Option<usize> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    let limit: usize = read("memory.max")?.trim().parse().ok()?;
    let used: usize = read("memory.current")?.trim().parse().ok()?;
    let stat = read("memory.stat").unwrap_or_default();
    let cached = stat.lines().find_map(|line| line.strip_prefix("file "));
    let cached: usize = cached.and_then(|n| n.trim().parse().ok()).unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(cached)))
}

fn evaluated(step: u64, loss: f64, perplexity: Option<f64>) -> String {
    let perplexity = perplexity.map_or_else(String::new, |p| format!(", perplexity {p:.2}"));
    format!("step {step}: held-out loss {loss:.4}{perplexity}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_group_bounds_what_is_available() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        assert_eq!(group_memory(folder.path()), None);
        write("memory.current", "3000\n");
        write("memory.max", "max\n");
        assert_eq!(group_memory(folder.path()), None);
        write("memory.max", "10000\n");
        assert_eq!(group_memory(folder.path()), Some(7000));
        write("memory.stat", "anon 500\nfile 2500\n");
        assert_eq!(group_memory(folder.path()), Some(9500));
        write("memory.current", "20000\n");
        assert_eq!(group_memory(folder.path()), Some(0));
    }
}
