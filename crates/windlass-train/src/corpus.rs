//! A small language to learn in a minute: stories, sums, counting, comparing and remembering, made from a seed.
//!
//! All of it follows a closed grammar, and every question has one right answer. A fifth of all sums, numbers to count
//! from, pairs to compare and lists to remember never occurs in training: the prompts are made of these alone, so that a
//! right answer has been worked out, not remembered. Nothing is read from a file.

use std::fmt;

use windlass_tensor::Rng;
use windlass_tensor::rng::splitmix64;

/// What separates documents in [`text`], and the end-of-text token a tokenizer for it should have.
pub const SEPARATOR: &str = "<|endoftext|>";

/// The default size of the corpus in bytes.
pub const DEFAULT_BYTES: usize = 3 << 20;

const NAMES: [(&str, &str); 8] = [
    ("Tom", "He"),
    ("Anna", "She"),
    ("Ben", "He"),
    ("Mia", "She"),
    ("Sam", "He"),
    ("Lily", "She"),
    ("Leo", "He"),
    ("Kate", "She"),
];
const COLORS: [&str; 6] = ["red", "blue", "green", "yellow", "black", "white"];
const THINGS: [&str; 8] = ["ball", "cup", "hat", "book", "kite", "drum", "boat", "lamp"];
const PLACES: [&str; 6] = ["garden", "kitchen", "forest", "school", "barn", "park"];

/// Questions of a document.
const LINES: usize = 8;

/// What a prompt asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The sum of two numbers.
    Sum,
    /// The three numbers that follow a number.
    Count,
    /// The larger of two numbers.
    Compare,
    /// What a person holds, from a list.
    Remember,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Sum, Self::Count, Self::Compare, Self::Remember];

    /// The line that begins a document of this kind.
    fn title(self) -> &'static str {
        match self {
            Self::Sum => "Sums:",
            Self::Count => "Counting:",
            Self::Compare => "The larger:",
            Self::Remember => "Remember:",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(match self {
            Self::Sum => "adding",
            Self::Count => "counting on",
            Self::Compare => "comparing",
            Self::Remember => "remembering",
        })
    }
}

/// A text to be continued, and the only right continuation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// What it asks for.
    pub kind: Kind,
    /// The text to be continued.
    pub text: String,
    /// The continuation up to the end of the line, without white space around it.
    pub answer: String,
}

/// The documents of the corpus: about `bytes` bytes in all, the same for the same seed.
pub fn documents(seed: u64, bytes: usize) -> impl Iterator<Item = String> {
    let mut rng = Rng::stream(seed, 0);
    let mut made = 0;
    std::iter::from_fn(move || {
        let document = document(&mut rng);
        let more = made < bytes;
        made += document.len() + SEPARATOR.len() + 1;
        more.then_some(document)
    })
}

/// The corpus as one text: each document is followed by a line with the [`SEPARATOR`].
pub fn text(seed: u64, bytes: usize) -> String {
    let lines = documents(seed, bytes).map(|document| format!("{document}{SEPARATOR}\n"));
    lines.collect()
}

/// `count` prompts of each kind, made of numbers and lists that are held out from every corpus.
pub fn prompts(seed: u64, count: usize) -> Vec<Prompt> {
    let mut rng = Rng::stream(seed, 1);
    let kinds = Kind::ALL
        .into_iter()
        .flat_map(|kind| std::iter::repeat_n(kind, count));
    kinds
        .map(|kind| {
            let (facts, mut lines) = game(&mut rng, kind, true);
            let (question, answer) = lines.swap_remove(0);
            let text = format!("{}\n{facts}{question}", kind.title());
            Prompt { kind, text, answer }
        })
        .collect()
}

/// How many prompts of each kind were continued right.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Score {
    /// Kind, right answers, prompts.
    pub kinds: Vec<(Kind, usize, usize)>,
}

impl Score {
    /// Scores one continuation for each prompt: right when its first line, without white space around it, is the
    /// answer.
    ///
    /// # Panics
    /// When there are not as many continuations as prompts.
    #[track_caller]
    pub fn new<S: AsRef<str>>(prompts: &[Prompt], continuations: &[S]) -> Self {
        assert_eq!(
            prompts.len(),
            continuations.len(),
            "prompts and continuations"
        );
        let mut kinds = Vec::new();
        for kind in Kind::ALL {
            let pairs = prompts.iter().zip(continuations);
            let asked: Vec<_> = pairs.filter(|(prompt, _)| prompt.kind == kind).collect();
            let right = asked.iter().filter(|(prompt, text)| {
                let line = text
                    .as_ref()
                    .trim_start()
                    .lines()
                    .next()
                    .unwrap_or_default();
                line.trim_end() == prompt.answer
            });
            if !asked.is_empty() {
                kinds.push((kind, right.count(), asked.len()));
            }
        }
        Self { kinds }
    }

    /// The fraction of right answers over all prompts.
    pub fn total(&self) -> f64 {
        let sum =
            |part: fn(&(Kind, usize, usize)) -> usize| self.kinds.iter().map(part).sum::<usize>();
        sum(|kind| kind.1) as f64 / sum(|kind| kind.2).max(1) as f64
    }

    /// The fraction of right answers of one kind; 0 when there was no such prompt.
    pub fn of(&self, kind: Kind) -> f64 {
        let mut kinds = self.kinds.iter();
        let found = kinds.find(|(other, _, _)| *other == kind);
        found.map_or(0.0, |&(_, right, asked)| right as f64 / asked as f64)
    }
}

/// One document in five is a story, the others are games, all kinds alike.
fn document(rng: &mut Rng) -> String {
    let choice = rng.below(1 + Kind::ALL.len() as u64) as usize;
    let Some(&kind) = Kind::ALL.get(choice) else {
        return story(rng);
    };
    let (facts, lines) = game(rng, kind, false);
    let mut text = format!("{}\n{facts}", kind.title());
    for (question, answer) in lines {
        text += &format!("{question} {answer}\n");
    }
    text
}

/// What stands before the questions, and the questions with their answers; all held out, or none.
fn game(rng: &mut Rng, kind: Kind, held_out: bool) -> (String, Vec<(String, String)>) {
    if kind == Kind::Remember {
        return remember(rng, held_out);
    }
    let lines = (0..LINES).map(|_| match kind {
        Kind::Sum => {
            let (a, b) = sum(rng, held_out);
            (format!("{a} + {b} ="), (a + b).to_string())
        }
        Kind::Count => {
            let n = pick(rng, held_out, |rng| [10 + rng.below(87), 0]).0;
            (format!("{n}"), format!("{} {} {}", n + 1, n + 2, n + 3))
        }
        _ => {
            let (a, b) = pick(rng, held_out, |rng| {
                distinct(rng, 90)[..2].try_into().expect("two numbers")
            });
            (
                format!("{} or {}?", a + 10, b + 10),
                (a.max(b) + 10).to_string(),
            )
        }
    });
    (String::new(), lines.collect())
}

/// A list of who holds what, and questions about it.
fn remember(rng: &mut Rng, held_out: bool) -> (String, Vec<(String, String)>) {
    // Whole lists are held out, not single facts: a fact that never occurs would be learned to be wrong.
    let (names, things) = loop {
        let (names, things) = (distinct(rng, NAMES.len()), distinct(rng, THINGS.len()));
        let digits = |list: &[u64]| list[..4].iter().fold(0, |n, digit| n * 10 + digit);
        if is_held_out(digits(&names), 10_000 + digits(&things)) == held_out {
            break (names, things);
        }
    };
    let fact = |i: usize| {
        (
            NAMES[names[i] as usize].0.to_string(),
            THINGS[things[i] as usize].to_string(),
        )
    };
    let facts: Vec<String> = (0..4)
        .map(fact)
        .map(|(name, thing)| format!("{name} {thing}"))
        .collect();
    let mut lines = Vec::new();
    while lines.len() < LINES {
        lines.extend(distinct(rng, 4).into_iter().map(|i| fact(i as usize)));
    }
    (format!("{}\n", facts.join("\n")), lines)
}

/// Whether a pair is kept out of training: one in five, whatever the seed and the order.
fn is_held_out(a: u64, b: u64) -> bool {
    let mut mix = (a.min(b) << 32) | a.max(b);
    splitmix64(&mut mix).is_multiple_of(5)
}

/// A pair that is held out, or one that is not.
fn pick(rng: &mut Rng, held_out: bool, draw: impl Fn(&mut Rng) -> [u64; 2]) -> (u64, u64) {
    loop {
        let [a, b] = draw(rng);
        if is_held_out(a, b) == held_out {
            return (a, b);
        }
    }
}

/// Two numbers below 100 whose digits add up without a carry.
fn sum(rng: &mut Rng, held_out: bool) -> (u64, u64) {
    loop {
        let (a, b) = pick(rng, held_out, |rng| {
            [10 + rng.below(90), 10 + rng.below(90)]
        });
        if a % 10 + b % 10 < 10 && a / 10 + b / 10 < 10 {
            return (a, b);
        }
    }
}

/// Two or three persons, each with a thing and a place, and what happens then.
fn story(rng: &mut Rng) -> String {
    let count = 2 + rng.below(2) as usize;
    let [names, places, things, colors] =
        [NAMES.len(), PLACES.len(), THINGS.len(), COLORS.len()].map(|n| distinct(rng, n));
    let mut text = String::from("Story:");
    for i in 0..count {
        let (name, pronoun) = NAMES[names[i] as usize];
        let (place, thing) = (PLACES[places[i] as usize], THINGS[things[i] as usize]);
        let color = COLORS[colors[i] as usize];
        text += &match rng.below(3) {
            0 => format!(" {name} has a {color} {thing}. {pronoun} is in the {place}."),
            1 => format!(" {name} is in the {place}. {pronoun} has a {color} {thing}."),
            _ => format!(" {name} is in the {place} with a {color} {thing}."),
        };
    }
    let [from, to] = [0, 1].map(|i| NAMES[names[i] as usize].0);
    match rng.below(3) {
        0 => {
            text += &format!(
                " Then {from} goes to the {}.",
                PLACES[places[count] as usize]
            )
        }
        1 => {
            text += &format!(
                " Then {from} gives the {} to {to}.",
                THINGS[things[0] as usize]
            )
        }
        _ => {}
    }
    text.push('\n');
    text
}

/// The numbers below `n` in a random order.
fn distinct(rng: &mut Rng, n: usize) -> Vec<u64> {
    let mut numbers: Vec<u64> = (0..n as u64).collect();
    rng.shuffle(&mut numbers);
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_corpus_is_true_and_the_prompts_are_new() {
        let corpus = text(3, 400_000);
        assert_eq!(corpus, text(3, 400_000));
        assert_ne!(corpus[..2_000], text(4, 2_000)[..2_000]);
        assert!((400_000..401_000).contains(&corpus.len()));
        let mut seen = [0; 4];
        for document in corpus.split(SEPARATOR) {
            let mut lines = document.trim_start().lines();
            let title = lines.next().unwrap_or_default();
            let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.title() == title) else {
                continue;
            };
            let lines: Vec<&str> = lines.collect();
            seen[kind as usize] += 1;
            for (i, line) in lines.iter().enumerate() {
                assert!(is_true(kind, line, &lines[..i.min(4)]), "{kind}: {line}");
            }
        }
        assert!(seen.iter().all(|&n| n > 500), "{seen:?}");

        let prompts = prompts(3, 100);
        for prompt in &prompts {
            let question = prompt.text.lines().last().unwrap();
            let facts: Vec<&str> = prompt.text.lines().skip(1).take(4).collect();
            assert!(
                is_true(
                    prompt.kind,
                    &format!("{question} {}", prompt.answer),
                    &facts
                ),
                "{}",
                prompt.text
            );
            let new = match prompt.kind {
                Kind::Remember => prompt.text.clone(),
                _ => format!("\n{question} {}\n", prompt.answer),
            };
            assert!(!corpus.contains(&new), "{new}");
        }
        let answers: Vec<String> = prompts
            .iter()
            .map(|prompt| format!(" {}\nQ", prompt.answer))
            .collect();
        let score = Score::new(&prompts, &answers);
        assert_eq!((score.total(), score.of(Kind::Compare)), (1.0, 1.0));
        let mixed = answers
            .iter()
            .enumerate()
            .map(|(i, a)| if i < 100 { a } else { " nobody" });
        let score = Score::new(&prompts, &mixed.collect::<Vec<_>>());
        assert_eq!(
            (score.of(Kind::Sum), score.of(Kind::Count), score.total()),
            (1.0, 0.0, 0.25)
        );
    }

    /// Whether a line of a game is right; `facts` are the lines that say who holds what.
    fn is_true(kind: Kind, line: &str, facts: &[&str]) -> bool {
        let numbers: Vec<u64> = line
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|word| word.parse().ok())
            .collect();
        match (kind, &numbers[..]) {
            (Kind::Sum, [a, b, c]) => a + b == *c,
            (Kind::Count, [a, b, c, d]) => a + 1 == *b && b + 1 == *c && c + 1 == *d,
            (Kind::Compare, [a, b, c]) => a.max(b) == c,
            (Kind::Remember, []) => facts.len() < 4 || facts.contains(&line),
            _ => false,
        }
    }
}
