//! Counters and histograms in Prometheus' text format, under vLLM's names with the prefix `windlass:`.

mod histogram;

use histogram::Histogram;
use std::fmt::Write;
use std::sync::Mutex;
use std::time::Duration;
use windlass_infer::engine::{EngineStats, Step};

/// Bounds for the times of whole requests and of their parts, in seconds.
const SECONDS: [f64; 18] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0,
    1000.0, 2500.0,
];
/// Bounds for the time between two tokens, in seconds.
const TOKEN_SECONDS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 5.0,
];
/// Bounds for numbers of tokens.
const TOKENS: [f64; 15] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4,
];
/// Bounds for numbers of choices.
const CHOICES: [f64; 6] = [1.0, 2.0, 4.0, 8.0, 16.0, 64.0];

/// How a request ended, as `finished_reason`.
const REASONS: [&str; 4] = ["stop", "length", "abort", "error"];

/// What one sequence came to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Finished {
    /// Index into the reasons: see [`Finished::STOP`].
    pub reason: usize,
    pub prompt_tokens: usize,
    pub generated: usize,
    pub max_tokens: usize,
    /// From arrival to the first step that computed for it.
    pub queued: Duration,
    /// From that step to the first token.
    pub prefill: Option<Duration>,
    /// From the first token to the last.
    pub decode: Option<Duration>,
    /// From arrival to the end.
    pub whole: Duration,
}

impl Finished {
    pub const STOP: usize = 0;
    pub const LENGTH: usize = 1;
    pub const ABORT: usize = 2;
    pub const ERROR: usize = 3;
}

/// All that is counted.
pub(crate) struct Metrics(Mutex<Counts>);

struct Counts {
    engine: EngineStats,
    prompt_tokens: u64,
    generation_tokens: u64,
    finished: [u64; REASONS.len()],
    rejected: u64,
    token_budget: usize,
    overhead: Duration,
    first_token: Histogram,
    inter_token: Histogram,
    per_token: Histogram,
    whole: Histogram,
    queued: Histogram,
    inference: Histogram,
    prefill: Histogram,
    decode: Histogram,
    iteration_tokens: Histogram,
    batch: Histogram,
    step: Histogram,
    request_prompt: Histogram,
    request_generation: Histogram,
    max_tokens: Histogram,
    choices: Histogram,
}

impl Metrics {
    pub fn new() -> Self {
        Metrics(Mutex::new(Counts {
            engine: EngineStats::default(),
            prompt_tokens: 0,
            generation_tokens: 0,
            finished: [0; REASONS.len()],
            rejected: 0,
            token_budget: 0,
            overhead: Duration::ZERO,
            first_token: Histogram::new(&SECONDS),
            inter_token: Histogram::new(&TOKEN_SECONDS),
            per_token: Histogram::new(&TOKEN_SECONDS),
            whole: Histogram::new(&SECONDS),
            queued: Histogram::new(&SECONDS),
            inference: Histogram::new(&SECONDS),
            prefill: Histogram::new(&SECONDS),
            decode: Histogram::new(&SECONDS),
            iteration_tokens: Histogram::new(&TOKENS),
            batch: Histogram::new(&TOKENS),
            step: Histogram::new(&SECONDS),
            request_prompt: Histogram::new(&TOKENS),
            request_generation: Histogram::new(&TOKENS),
            max_tokens: Histogram::new(&TOKENS),
            choices: Histogram::new(&CHOICES),
        }))
    }

    fn with(&self, change: impl FnOnce(&mut Counts)) {
        // Counting cannot leave half a change behind, so a panic elsewhere spoils nothing.
        change(
            &mut self
                .0
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner()),
        );
    }

    /// The engine as it is now.
    pub fn engine(&self, stats: EngineStats) {
        self.with(|counts| counts.engine = stats);
    }

    /// Tokens of a step that the engine may compute.
    pub fn token_budget(&self, tokens: usize) {
        self.with(|counts| counts.token_budget = tokens);
    }

    /// A step and its time, and the time since the step before, where the one followed the other.
    pub fn step(&self, step: &Step, time: Duration, between: Duration) {
        self.with(|counts| {
            counts.iteration_tokens.observe(step.tokens as f64);
            counts.batch.observe(step.sequences as f64);
            counts.step.observe(time.as_secs_f64());
            counts.overhead += between;
        });
    }

    /// A request was taken: how many choices it wants.
    pub fn arrived(&self, choices: usize) {
        self.with(|counts| counts.choices.observe(choices as f64));
    }

    /// A request was refused since too many wait.
    pub fn rejected(&self) {
        self.with(|counts| counts.rejected += 1);
    }

    /// A token came, and how long after the one before or, the first one, after arrival.
    pub fn token(&self, first: bool, after: Duration) {
        self.with(|counts| {
            counts.generation_tokens += 1;
            let histogram = match first {
                true => &mut counts.first_token,
                false => &mut counts.inter_token,
            };
            histogram.observe(after.as_secs_f64());
        });
    }

    /// A sequence has ended.
    pub fn finished(&self, of: &Finished) {
        self.with(|counts| {
            counts.finished[of.reason] += 1;
            counts.prompt_tokens += of.prompt_tokens as u64;
            counts.request_prompt.observe(of.prompt_tokens as f64);
            counts.request_generation.observe(of.generated as f64);
            counts.max_tokens.observe(of.max_tokens as f64);
            counts.queued.observe(of.queued.as_secs_f64());
            counts.whole.observe(of.whole.as_secs_f64());
            let inference = of.whole.saturating_sub(of.queued);
            counts.inference.observe(inference.as_secs_f64());
            if let Some(prefill) = of.prefill {
                counts.prefill.observe(prefill.as_secs_f64());
            }
            if let Some(decode) = of.decode {
                counts.decode.observe(decode.as_secs_f64());
                if of.generated > 1 {
                    let mean = decode.as_secs_f64() / (of.generated - 1) as f64;
                    counts.per_token.observe(mean);
                }
            }
        });
    }

    /// Everything, as Prometheus reads it.
    pub fn text(&self, model: &str) -> String {
        let mut page = Page {
            text: String::new(),
            labels: format!("model_name=\"{}\"", escaped(model)),
        };
        self.with(|counts| counts.write(&mut page));
        page.text
    }
}

/// A label's value, as the format wants it.
fn escaped(value: &str) -> String {
    let value = value.replace('\\', "\\\\");
    value.replace('"', "\\\"").replace('\n', "\\n")
}

/// The text under way.
struct Page {
    text: String,
    labels: String,
}

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(
            self.text,
            "# HELP windlass:{name} {help}\n# TYPE windlass:{name} {kind}"
        );
    }

    fn value(&mut self, kind: &str, name: &str, help: &str, value: f64) {
        self.head(name, kind, help);
        let _ = writeln!(self.text, "windlass:{name}{{{}}} {value}", self.labels);
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.value("gauge", name, help, value);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.value("counter", name, help, value as f64);
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, "histogram", help);
        histogram.write(&mut self.text, &format!("windlass:{name}"), &self.labels);
    }
}

impl Counts {
    fn write_engine(&self, page: &mut Page) {
        let of = &self.engine.scheduler;
        let usage = of.blocks_used as f64 / of.blocks.max(1) as f64;
        page.gauge(
            "num_requests_running",
            "Sequences being computed.",
            of.running as f64,
        );
        page.gauge(
            "num_requests_waiting",
            "Sequences that wait to be let in.",
            of.waiting as f64,
        );
        page.gauge(
            "kv_cache_usage_perc",
            "Part of the key-value blocks that sequences own, from 0 to 1.",
            usage,
        );
        page.gauge("kv_cache_blocks", "Key-value blocks.", of.blocks as f64);
        page.gauge(
            "kv_cache_blocks_used",
            "Key-value blocks that sequences own.",
            of.blocks_used as f64,
        );
        page.gauge(
            "kv_cache_blocks_cached",
            "Free blocks whose content can be found again.",
            of.blocks_cached as f64,
        );
        page.gauge(
            "token_budget",
            "Tokens that a step may compute while answers run.",
            self.token_budget as f64,
        );
        page.counter(
            "prefix_cache_queries_total",
            "Tokens of prompts looked for in the cache.",
            of.prefix_queries,
        );
        page.counter(
            "prefix_cache_hits_total",
            "Tokens of prompts found in the cache.",
            of.prefix_hits,
        );
        page.counter(
            "prompt_tokens_cached_total",
            "Tokens of prompts that were not computed again.",
            of.prefix_hits,
        );
        page.counter(
            "num_preemptions_total",
            "Sequences that lost their blocks.",
            of.preemptions,
        );
        page.counter(
            "computed_tokens_total",
            "Tokens computed.",
            of.computed_tokens,
        );
        page.counter(
            "engine_steps_total",
            "Passes through the model.",
            self.engine.steps,
        );
    }

    fn write(&self, page: &mut Page) {
        self.write_engine(page);
        page.value(
            "counter",
            "engine_overhead_seconds_total",
            "Time between passes that follow one another: requests taken, answers handed out.",
            self.overhead.as_secs_f64(),
        );
        page.counter(
            "prompt_tokens_total",
            "Tokens of the prompts of finished requests.",
            self.prompt_tokens,
        );
        page.counter(
            "generation_tokens_total",
            "Tokens generated.",
            self.generation_tokens,
        );
        page.counter(
            "requests_rejected_total",
            "Requests refused since too many wait.",
            self.rejected,
        );
        page.head(
            "request_success_total",
            "counter",
            "Sequences that have ended, by reason.",
        );
        for (reason, count) in REASONS.iter().zip(self.finished) {
            let labels = &page.labels;
            let _ = writeln!(
                page.text,
                "windlass:request_success_total{{{labels},finished_reason=\"{reason}\"}} {count}"
            );
        }
        for (name, help, histogram) in self.times().into_iter().chain(self.sizes()) {
            page.histogram(name, help, histogram);
        }
    }

    /// Histograms of times of requests: name, meaning, values.
    fn times(&self) -> [(&'static str, &'static str, &Histogram); 8] {
        [
            (
                "time_to_first_token_seconds",
                "From arrival to the first token.",
                &self.first_token,
            ),
            (
                "inter_token_latency_seconds",
                "Between two tokens of a sequence.",
                &self.inter_token,
            ),
            (
                "request_time_per_output_token_seconds",
                "Mean time between the tokens of a sequence.",
                &self.per_token,
            ),
            (
                "e2e_request_latency_seconds",
                "From arrival to the end.",
                &self.whole,
            ),
            (
                "request_queue_time_seconds",
                "From arrival to the first step.",
                &self.queued,
            ),
            (
                "request_inference_time_seconds",
                "From the first step to the end.",
                &self.inference,
            ),
            (
                "request_prefill_time_seconds",
                "From the first step to the first token.",
                &self.prefill,
            ),
            (
                "request_decode_time_seconds",
                "From the first token to the last.",
                &self.decode,
            ),
        ]
    }

    /// Histograms of steps, and of sizes.
    fn sizes(&self) -> [(&'static str, &'static str, &Histogram); 7] {
        [
            (
                "iteration_tokens_total",
                "Tokens computed in a step.",
                &self.iteration_tokens,
            ),
            ("iteration_sequences", "Sequences in a step.", &self.batch),
            ("iteration_seconds", "Time of a step.", &self.step),
            (
                "request_prompt_tokens",
                "Tokens of a prompt.",
                &self.request_prompt,
            ),
            (
                "request_generation_tokens",
                "Tokens of an answer.",
                &self.request_generation,
            ),
            (
                "request_params_max_tokens",
                "The most tokens that an answer may have.",
                &self.max_tokens,
            ),
            (
                "request_params_n",
                "Choices that a request wants.",
                &self.choices,
            ),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every line is a comment or `name{labels} value`; every sample follows its own TYPE line.
    #[test]
    fn the_text_is_prometheus() {
        let metrics = Metrics::new();
        metrics.token(true, Duration::from_millis(30));
        metrics.token(false, Duration::from_millis(3));
        metrics.arrived(2);
        let step = Step {
            tokens: 7,
            sequences: 2,
            ..Step::default()
        };
        metrics.step(&step, Duration::from_millis(4), Duration::ZERO);
        metrics.finished(&Finished {
            reason: Finished::LENGTH,
            prompt_tokens: 5,
            generated: 2,
            max_tokens: 2,
            queued: Duration::ZERO,
            prefill: Some(Duration::from_millis(30)),
            decode: Some(Duration::from_millis(3)),
            whole: Duration::from_millis(33),
        });
        let text = metrics.text("a\"b\\c");
        let mut kind = (String::new(), String::new());
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, of) = rest.split_once(' ').unwrap();
                kind = (name.to_owned(), of.to_owned());
                continue;
            }
            if line.starts_with("# HELP ") {
                continue;
            }
            let (name, rest) = line.split_once('{').unwrap();
            assert!(name.starts_with(&kind.0), "{line}");
            let (labels, value) = rest.rsplit_once("} ").unwrap();
            assert!(labels.starts_with(r#"model_name="a\"b\\c""#), "{line}");
            value.parse::<f64>().unwrap_or_else(|_| panic!("{line}"));
        }
        for line in [
            r#"windlass:request_success_total{model_name="a\"b\\c",finished_reason="length"} 1"#,
            r#"windlass:time_to_first_token_seconds_bucket{model_name="a\"b\\c",le="0.025"} 0"#,
            r#"windlass:time_to_first_token_seconds_bucket{model_name="a\"b\\c",le="0.05"} 1"#,
            r#"windlass:time_to_first_token_seconds_bucket{model_name="a\"b\\c",le="+Inf"} 1"#,
            r#"windlass:request_prompt_tokens_sum{model_name="a\"b\\c"} 5"#,
            r#"windlass:generation_tokens_total{model_name="a\"b\\c"} 2"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }
}
