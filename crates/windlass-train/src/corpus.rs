//! A small language to learn in a minute: stories with questions, and sums, made from a seed.
//!
//! The stories follow a closed grammar and keep track of who is where and who has what, so that every question has
//! one right answer; the sums have no carry. A fifth of all opening facts and of all sums never occurs in training:
//! the prompts are made of these alone, so that a right answer has been worked out, not remembered. Nothing is read
//! from a file.

use std::fmt;

use windlass_tensor::Rng;
use windlass_tensor::rng::splitmix64;

/// What separates documents in [`text`], and the end-of-text token a tokenizer for it should have.
pub const SEPARATOR: &str = "<|endoftext|>";

/// The default size of the corpus in bytes.
pub const DEFAULT_BYTES: usize = 3 << 20;

const NAMES: [(&str, &str); 12] = [
    ("Tom", "He"),
    ("Anna", "She"),
    ("Ben", "He"),
    ("Mia", "She"),
    ("Sam", "He"),
    ("Lily", "She"),
    ("Max", "He"),
    ("Rose", "She"),
    ("Leo", "He"),
    ("Emma", "She"),
    ("Jack", "He"),
    ("Kate", "She"),
];
const COLORS: [&str; 6] = ["red", "blue", "green", "yellow", "black", "white"];
const THINGS: [&str; 10] = [
    "ball", "cup", "hat", "book", "kite", "drum", "bell", "boat", "doll", "lamp",
];
const PLACES: [&str; 8] = [
    "garden", "kitchen", "forest", "school", "barn", "market", "park", "tower",
];

/// What a prompt asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The sum of two numbers.
    Sum,
    /// Where a person is.
    Person,
    /// Who has a thing.
    Owner,
    /// The color of a thing.
    Color,
    /// Where a thing is: where its owner is.
    Thing,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 5] = [
        Self::Sum,
        Self::Person,
        Self::Owner,
        Self::Color,
        Self::Thing,
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(match self {
            Self::Sum => "sums",
            Self::Person => "where is a person",
            Self::Owner => "who has a thing",
            Self::Color => "the color of a thing",
            Self::Thing => "where is a thing",
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

/// `count` prompts of each kind, made of sums and facts that are held out from every corpus.
pub fn prompts(seed: u64, count: usize) -> Vec<Prompt> {
    let mut rng = Rng::stream(seed, 1);
    let mut prompts = Vec::new();
    for kind in Kind::ALL {
        for _ in 0..count {
            prompts.push(match kind {
                Kind::Sum => {
                    let (a, b) = sum(&mut rng, true);
                    Prompt {
                        kind,
                        text: format!("Sums:\n{a} + {b} ="),
                        answer: (a + b).to_string(),
                    }
                }
                kind => {
                    let story = Story::new(&mut rng, true);
                    let (question, answer) = story.ask(&mut rng, kind);
                    Prompt {
                        kind,
                        text: format!("{}\nQuestion: {question}\nAnswer:", story.text),
                        answer,
                    }
                }
            });
        }
    }
    prompts
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

/// Two documents in three are stories.
fn document(rng: &mut Rng) -> String {
    if rng.below(3) == 0 {
        let mut text = String::from("Sums:\n");
        for _ in 0..8 {
            let (a, b) = sum(rng, false);
            text += &format!("{a} + {b} = {}\n", a + b);
        }
        return text;
    }
    let story = Story::new(rng, false);
    let mut text = format!("{}\n", story.text);
    let mut kinds = [Kind::Person, Kind::Owner, Kind::Color, Kind::Thing];
    rng.shuffle(&mut kinds);
    for kind in kinds {
        let (question, answer) = story.ask(rng, kind);
        text += &format!("Question: {question}\nAnswer: {answer}\n");
    }
    text
}

/// Whether a combination is kept out of training: one in five, whatever the seed.
fn is_held_out(a: usize, b: usize, c: usize) -> bool {
    let mut mix = (a as u64) << 40 | (b as u64) << 20 | c as u64;
    splitmix64(&mut mix).is_multiple_of(5)
}

/// Two numbers below 100 whose digits add up without a carry; held out or not, in either order.
fn sum(rng: &mut Rng, held_out: bool) -> (u64, u64) {
    let small = rng.below(5) == 0;
    loop {
        let [a, b] = [0; 2].map(|_| {
            if small {
                rng.below(10)
            } else {
                10 + rng.below(90)
            }
        });
        let carry = a % 10 + b % 10 > 9 || a / 10 + b / 10 > 9;
        let key = is_held_out(usize::MAX, a.min(b) as usize, a.max(b) as usize);
        if !carry && key == held_out {
            return (a, b);
        }
    }
}

/// A person in a story, and where they are.
#[derive(Clone, Debug)]
struct Person {
    name: usize,
    place: usize,
}

/// A thing in a story; `owner` is a place in the list of persons.
#[derive(Clone, Debug)]
struct Thing {
    color: usize,
    thing: usize,
    owner: usize,
}

/// A story and how things stand at its end.
struct Story {
    text: String,
    persons: Vec<Person>,
    things: Vec<Thing>,
}

impl Story {
    /// Two or three persons, each with a thing and a place; then, in half of the stories, a change. The facts of the
    /// opening (a person with a thing at a place) are all held out in a held-out story, and none is in another.
    fn new(rng: &mut Rng, held_out: bool) -> Self {
        let count = 2 + rng.below(2) as usize;
        let (names, places, things) = loop {
            let names = distinct(rng, NAMES.len());
            let places = distinct(rng, PLACES.len());
            let things = distinct(rng, THINGS.len());
            if (0..count).all(|i| is_held_out(names[i], things[i], places[i]) == held_out) {
                break (names, places, things);
            }
        };
        let colors = distinct(rng, COLORS.len());
        let person = |i: usize| Person {
            name: names[i],
            place: places[i],
        };
        let thing = |i: usize| Thing {
            color: colors[i],
            thing: things[i],
            owner: i,
        };
        let mut story = Self {
            text: "Story:".into(),
            persons: (0..count).map(person).collect(),
            things: (0..count).map(thing).collect(),
        };
        for i in 0..count {
            story.introduce(rng, i);
        }
        match rng.below(4) {
            0 => story.travel(rng, places[count]),
            1 => story.give(rng),
            _ => {}
        }
        story
    }

    fn introduce(&mut self, rng: &mut Rng, i: usize) {
        let (name, pronoun) = NAMES[self.persons[i].name];
        let (place, thing) = (PLACES[self.persons[i].place], THINGS[self.things[i].thing]);
        let color = COLORS[self.things[i].color];
        self.text += &match rng.below(3) {
            0 => format!(" {name} has a {color} {thing}. {pronoun} is in the {place}."),
            1 => format!(" {name} is in the {place}. {pronoun} has a {color} {thing}."),
            _ => format!(" {name} is in the {place} with a {color} {thing}."),
        };
    }

    fn travel(&mut self, rng: &mut Rng, place: usize) {
        let i = rng.below(self.persons.len() as u64) as usize;
        self.persons[i].place = place;
        let name = NAMES[self.persons[i].name].0;
        self.text += &format!(" Then {name} goes to the {}.", PLACES[place]);
    }

    fn give(&mut self, rng: &mut Rng) {
        let pair = distinct(rng, self.persons.len());
        self.things[pair[0]].owner = pair[1];
        let [from, to] = [pair[0], pair[1]].map(|i| NAMES[self.persons[i].name].0);
        let thing = THINGS[self.things[pair[0]].thing];
        self.text += &format!(" Then {from} gives the {thing} to {to}.");
    }

    /// A question about the story, and its answer.
    fn ask(&self, rng: &mut Rng, kind: Kind) -> (String, String) {
        let person = rng.choose(&self.persons);
        let thing = rng.choose(&self.things);
        let owner = &self.persons[thing.owner];
        let (name, what) = (NAMES[person.name].0, THINGS[thing.thing]);
        let place = |person: &Person| format!("in the {}.", PLACES[person.place]);
        match kind {
            Kind::Person => (format!("Where is {name}?"), place(person)),
            Kind::Owner => (
                format!("Who has the {what}?"),
                format!("{}.", NAMES[owner.name].0),
            ),
            Kind::Color => (
                format!("What color is the {what}?"),
                format!("{}.", COLORS[thing.color]),
            ),
            Kind::Thing => (format!("Where is the {what}?"), place(owner)),
            Kind::Sum => unreachable!("a story has no sums"),
        }
    }
}

/// The numbers below `n` in a random order.
fn distinct(rng: &mut Rng, n: usize) -> Vec<usize> {
    let mut numbers: Vec<usize> = (0..n).collect();
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
        let numbers = |line: &str| -> Vec<u64> {
            line.split([' ', '+', '=', '\n'])
                .filter_map(|word| word.parse().ok())
                .collect()
        };
        let (mut sums, mut questions) = (0, 0);
        for line in corpus.lines() {
            if line.contains('+') {
                let [a, b, c] = numbers(line)[..] else {
                    panic!("{line}")
                };
                assert_eq!(a + b, c, "{line}");
                assert!(
                    !is_held_out(usize::MAX, a.min(b) as usize, a.max(b) as usize),
                    "{line}"
                );
                sums += 1;
            }
            questions += usize::from(line.starts_with("Question"));
        }
        assert!(
            sums > 4_000 && questions > 4_000,
            "{sums} sums, {questions} questions"
        );

        let prompts = prompts(3, 100);
        for prompt in &prompts {
            assert!(
                !corpus.contains(&format!("{} ", prompt.text)),
                "{}",
                prompt.text
            );
            match prompt.kind {
                Kind::Sum => {
                    let [a, b] = numbers(&prompt.text)[..] else {
                        panic!("{}", prompt.text)
                    };
                    assert_eq!(prompt.answer, (a + b).to_string());
                }
                _ => {
                    let story = prompt.text.lines().next().unwrap();
                    assert!(!corpus.contains(story), "{story}");
                    let answer = prompt
                        .answer
                        .trim_end_matches('.')
                        .rsplit(' ')
                        .next()
                        .unwrap();
                    assert!(story.contains(answer), "{story} {answer}");
                }
            }
        }
        let answers: Vec<String> = prompts
            .iter()
            .map(|prompt| format!(" {}\nQ", prompt.answer))
            .collect();
        let score = Score::new(&prompts, &answers);
        assert_eq!((score.total(), score.of(Kind::Owner)), (1.0, 1.0));
        let wrong: Vec<&str> = prompts.iter().map(|_| " nobody").collect();
        let mixed: Vec<&str> = (0..500)
            .map(|i| if i < 100 { &answers[i] } else { wrong[i] })
            .collect();
        let score = Score::new(&prompts, &mixed);
        assert_eq!(
            (score.of(Kind::Sum), score.of(Kind::Color), score.total()),
            (1.0, 0.0, 0.2)
        );
    }

    #[test]
    fn answers_follow_the_story() {
        let mut rng = Rng::new(1);
        for _ in 0..2_000 {
            let held_out = rng.below(2) == 0;
            let story = Story::new(&mut rng, held_out);
            for (i, person) in story.persons.iter().enumerate() {
                let name = NAMES[person.name].0;
                // The last place named after the person, before the next one is introduced.
                let goes = format!("Then {name} goes to the ");
                let is = format!(" {name} ");
                let part = match story.text.rfind(&goes) {
                    Some(at) => &story.text[at + 5..],
                    None => &story.text[story.text.find(&is).unwrap()..],
                };
                let after = PLACES
                    .iter()
                    .filter_map(|place| Some((part.find(&format!("the {place}"))?, place)));
                assert_eq!(
                    *after.min().unwrap().1,
                    PLACES[person.place],
                    "{}",
                    story.text
                );
                assert!(story.things.iter().filter(|thing| thing.owner == i).count() <= 2);
            }
            for thing in &story.things {
                let name = NAMES[story.persons[thing.owner].name].0;
                let given = format!("gives the {} to {name}.", THINGS[thing.thing]);
                let color = format!("a {} {}", COLORS[thing.color], THINGS[thing.thing]);
                let begin = &story.text[..story.text.find(&color).unwrap()];
                let first = NAMES
                    .iter()
                    .filter_map(|(name, _)| Some((begin.rfind(name)?, *name)))
                    .max();
                let gave = story
                    .text
                    .contains(&format!("gives the {} ", THINGS[thing.thing]));
                let expected = if gave {
                    story.text.contains(&given)
                } else {
                    first.unwrap().1 == name
                };
                assert!(expected, "{}", story.text);
            }
        }
    }
}
