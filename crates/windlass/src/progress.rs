//! Progress of long work on stderr: a bar on a terminal, a plain line every few seconds elsewhere.
//!
//! Nothing is written to stdout, and `NO_COLOR` and a dumb terminal are respected. How fast the work goes
//! beyond its estimated end is the caller's to say in the message.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};

/// The time between two plain lines.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);
/// The most redraws of the bar in a second.
const REDRAWS_PER_SECOND: u8 = 10;

/// Whether this process keeps still.
static HUSHED: AtomicBool = AtomicBool::new(false);

/// Lets this process keep still: of the processes of a job, one tells how it goes.
pub fn hush() {
    HUSHED.store(true, Ordering::Relaxed);
}

/// Writes a line to stderr, unless this process keeps still.
pub fn say(line: &str) {
    if !HUSHED.load(Ordering::Relaxed) {
        eprintln!("{line}");
    }
}

/// One piece of work with a known amount to do.
pub struct Progress {
    display: Display,
}

enum Display {
    Bar(ProgressBar),
    Lines(Lines),
    Nothing,
}

impl Progress {
    /// Work of `total` units (steps, bytes) under a short name.
    pub fn new(total: u64, label: &str) -> Self {
        if HUSHED.load(Ordering::Relaxed) {
            let display = Display::Nothing;
            return Self { display };
        }
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        if !std::io::stderr().is_terminal() || dumb {
            let lines = Lines::new(total, label, Instant::now());
            return Self {
                display: Display::Lines(lines),
            };
        }
        let color = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let target = ProgressDrawTarget::stderr_with_hz(REDRAWS_PER_SECOND);
        let bar = ProgressBar::with_draw_target(Some(total), target)
            .with_style(bar_style(color))
            .with_prefix(label.to_owned())
            .with_finish(ProgressFinish::Abandon);
        Self {
            display: Display::Bar(bar),
        }
    }

    /// States the units done and how it goes, such as the loss.
    pub fn set(&mut self, done: u64, message: &str) {
        match &mut self.display {
            Display::Bar(bar) => {
                bar.set_message(message.to_owned());
                bar.set_position(done);
            }
            Display::Lines(lines) => {
                if let Some(line) = lines.due(done, message, Instant::now()) {
                    eprintln!("{line}");
                }
            }
            Display::Nothing => {}
        }
    }

    /// Writes a line to stderr without disturbing the bar.
    pub fn note(&self, line: &str) {
        match &self.display {
            Display::Bar(bar) => bar.suspend(|| eprintln!("{line}")),
            Display::Lines(_) => eprintln!("{line}"),
            Display::Nothing => {}
        }
    }

    /// Ends the work: the bar or a last line stays with this message.
    pub fn finish(self, message: &str) {
        match self.display {
            Display::Bar(bar) => bar.abandon_with_message(message.to_owned()),
            Display::Lines(lines) => eprintln!("{}", lines.last(message, Instant::now())),
            Display::Nothing => {}
        }
    }
}

fn bar_style(color: bool) -> ProgressStyle {
    let bar = if color {
        "{bar:24.cyan/blue}"
    } else {
        "{bar:24}"
    };
    let template = format!("{{prefix}} {bar} {{percent:>3}} % {{msg}} [{{elapsed}} < {{eta}}]");
    ProgressStyle::with_template(&template)
        .expect("the template is a constant")
        .progress_chars("━╸─")
}

/// The plain form: it decides when a line is due and what it says.
struct Lines {
    label: String,
    total: u64,
    started: Instant,
    last: Instant,
}

impl Lines {
    fn new(total: u64, label: &str, now: Instant) -> Self {
        Self {
            label: label.to_owned(),
            total,
            started: now,
            last: now,
        }
    }

    fn due(&mut self, done: u64, message: &str, now: Instant) -> Option<String> {
        if now - self.last < PLAIN_INTERVAL {
            return None;
        }
        self.last = now;
        let percent = 100.0 * done as f64 / self.total.max(1) as f64;
        Some(format!("{}: {percent:.0} % {message}", self.label))
    }

    fn last(&self, message: &str, now: Instant) -> String {
        let seconds = (now - self.started).as_secs_f64();
        format!("{}: {message} ({seconds:.1} s)", self.label)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_come_every_few_seconds() {
        let start = Instant::now();
        let mut lines = Lines::new(200, "train", start);
        let mut shown = Vec::new();
        for second in 0..14 {
            let now = start + Duration::from_secs(second);
            shown.extend(lines.due(second * 10, "loss 2.5", now));
        }
        assert_eq!(shown, ["train: 25 % loss 2.5", "train: 50 % loss 2.5"]);
        let end = lines.last("loss 2.1", start + Duration::from_millis(14_250));
        assert_eq!(end, "train: loss 2.1 (14.2 s)");
        let empty = Lines::new(0, "x", start).due(0, "", start + PLAIN_INTERVAL);
        assert_eq!(empty.unwrap(), "x: 0 % ");
    }

    #[test]
    fn both_styles_are_valid_templates() {
        bar_style(true);
        bar_style(false);
        let mut progress = Progress::new(3, "test");
        progress.set(1, "one");
        progress.finish("done");
    }
}
