//! Which tokens are learned from and which are held back to measure.

use std::ops::Range;
use std::sync::Arc;

use windlass_tensor::Rng;

use super::tokens::TokenFile;
use crate::error::{Error, Result};

/// A selection of a token file's tokens, read as one stream.
#[derive(Clone, Debug)]
pub struct View {
    file: Arc<TokenFile>,
    /// Ranges of the file, in order.
    spans: Vec<Range<u64>>,
    /// Where each span begins in the stream, and the length of the stream.
    begins: Vec<u64>,
}

impl View {
    /// All tokens of a file.
    pub fn whole(file: Arc<TokenFile>) -> Self {
        let all = 0..file.tokens();
        Self::new(file, vec![all])
    }

    fn new(file: Arc<TokenFile>, spans: Vec<Range<u64>>) -> Self {
        let mut begins = vec![0];
        for span in &spans {
            begins.push(begins[begins.len() - 1] + span.end - span.start);
        }
        Self {
            file,
            spans,
            begins,
        }
    }

    /// The number of tokens.
    pub fn tokens(&self) -> u64 {
        self.begins[self.spans.len()]
    }

    /// The file whose tokens these are.
    pub fn file(&self) -> &TokenFile {
        &self.file
    }

    /// Appends the ids of `range` of the stream to `ids`, and to `starts` the places, counted from the beginning of
    /// the range, where a document begins.
    ///
    /// # Panics
    /// When the range passes the end of the stream.
    #[track_caller]
    pub fn read(&self, range: Range<u64>, ids: &mut Vec<u32>, starts: &mut Vec<usize>) {
        assert!(
            range.end <= self.tokens(),
            "tokens {range:?} of a stream of {}",
            self.tokens()
        );
        let offsets = self.file.offsets();
        let mut at = range.start;
        let mut span = self.begins.partition_point(|&begin| begin <= at) - 1;
        while at < range.end {
            let to = range.end.min(self.begins[span + 1]);
            let shift = self.spans[span].start - self.begins[span];
            let part = at + shift..to + shift;
            let relative = |place: u64| (place - shift - range.start) as usize;
            if part.start == self.spans[span].start {
                starts.push(relative(part.start));
            }
            // A document that begins with the span is there already.
            let first = offsets.partition_point(|&begin| {
                begin < part.start || (begin == part.start && begin == self.spans[span].start)
            });
            let inside = offsets[first..]
                .iter()
                .take_while(|&&begin| begin < part.end);
            starts.extend(inside.map(|&begin| relative(begin)));
            self.file.read(part, ids);
            at = to;
            span += 1;
        }
    }
}

/// How data were held out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldOutBy {
    /// Nothing was.
    Nothing,
    /// Whole documents, chosen at random.
    Documents,
    /// The end of the stream, because there are too few documents.
    Tail,
}

/// Training data and held-out data, without a token in common.
#[derive(Clone, Debug)]
pub struct Split {
    /// What is learned from.
    pub train: View,
    /// What is measured on.
    pub held_out: Option<View>,
    /// How the two were parted.
    pub by: HeldOutBy,
}

impl Split {
    /// Holds `fraction` of a file back: as many documents, chosen by `seed`, or the last tokens when that fraction of
    /// the documents is less than one.
    ///
    /// # Errors
    /// [`Error::Setting`] when the fraction is not in `[0, 1)`.
    pub fn new(file: &Arc<TokenFile>, fraction: f64, seed: u64) -> Result<Self> {
        if !(0.0..1.0).contains(&fraction) {
            return Err(Error::Setting {
                setting: "the held-out fraction",
                value: fraction.to_string(),
                range: "at least 0 and less than 1",
            });
        }
        let documents = file.description().documents;
        let count = (fraction * documents as f64).round() as u64;
        let (by, train, held_out) = if fraction == 0.0 {
            let all = 0..file.tokens();
            (HeldOutBy::Nothing, vec![all], Vec::new())
        } else if count >= 1 && count < documents {
            let chosen = choose(documents, count, seed);
            let (train, held_out) = part(file.offsets(), &chosen);
            (HeldOutBy::Documents, train, held_out)
        } else {
            let tokens = file.tokens();
            let tail = ((fraction * tokens as f64).round() as u64).clamp(1, tokens - 1);
            let (train, held_out) = (0..tokens - tail, tokens - tail..tokens);
            (HeldOutBy::Tail, vec![train], vec![held_out])
        };
        Ok(Self {
            train: View::new(file.clone(), train),
            held_out: (!held_out.is_empty()).then(|| View::new(file.clone(), held_out)),
            by,
        })
    }
}

/// `count` of the numbers below `bound`, sorted, every selection with the same probability.
///
/// # Source
/// R. Floyd, in J. Bentley, "Programming Pearls: A Sample of Brilliance", 1987.
fn choose(bound: u64, count: u64, seed: u64) -> Vec<u64> {
    let mut rng = Rng::new(seed);
    let mut chosen = std::collections::BTreeSet::new();
    for last in bound - count..bound {
        let number = rng.below(last + 1);
        if !chosen.insert(number) {
            chosen.insert(last);
        }
    }
    chosen.into_iter().collect()
}

/// The token ranges of the documents that are not chosen, neighbors joined, and of those that are.
fn part(offsets: &[u64], chosen: &[u64]) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
    let (mut train, mut held_out) = (Vec::new(), Vec::new());
    let mut begin = 0;
    for &document in chosen {
        let range = offsets[document as usize]..offsets[document as usize + 1];
        if begin < range.start {
            train.push(begin..range.start);
        }
        begin = range.end;
        held_out.push(range);
    }
    let end = offsets[offsets.len() - 1];
    if begin < end {
        train.push(begin..end);
    }
    (train, held_out)
}
