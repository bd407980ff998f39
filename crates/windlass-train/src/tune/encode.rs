//! Samples as tokens, each to be learned or only read.

use super::form::{Sample, Turns};
use super::rows::Row;
use crate::error::{Error, Result};
use serde_json::Value;
use windlass_model::{ChatOptions, ChatTemplate, LocalTime, Tokenizer};

/// Which tokens are learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Learned {
    /// Completions, and everything of texts and conversations: as TRL has it.
    #[default]
    Usual,
    /// Everything.
    All,
    /// What follows a prompt; of a conversation, its last message.
    Completion,
    /// What the assistant says, as the template marks it.
    Assistant,
}

/// What becomes of a sample that is too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Long {
    /// Its end is cut off.
    #[default]
    Cut,
    /// It is left out.
    Drop,
    /// It is an error.
    Refuse,
}

/// A tokenized sample.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Whether each is learned. As long as `ids`.
    pub learned: Vec<bool>,
    /// Whether a rated answer is a good one.
    pub label: bool,
}

impl Example {
    /// Tokens that are learned: the first one has nothing it could be predicted from.
    pub fn learned(&self) -> usize {
        self.learned.iter().skip(1).filter(|&&l| l).count()
    }
}

/// What became of the samples.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Lengths in tokens, before cutting, sorted.
    pub lengths: Vec<usize>,
    /// Samples that were cut.
    pub cut: usize,
    /// Samples that were left out.
    pub dropped: usize,
    /// Tokens that are learned.
    pub learned: usize,
    /// Tokens.
    pub tokens: usize,
}

impl Report {
    /// The length below which a part of the samples is.
    pub fn quantile(&self, part: f64) -> usize {
        let last = self.lengths.len().saturating_sub(1);
        self.lengths
            .get((part * last as f64).round() as usize)
            .copied()
            .unwrap_or(0)
    }
}

/// Renders and encodes samples.
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<ChatTemplate>,
    learned: Learned,
    now: Option<LocalTime>,
    max_length: usize,
    long: Long,
}

impl<'a> Encoder<'a> {
    /// An encoder; `now` is the date for templates that write it.
    ///
    /// # Errors
    /// [`Error::NoMarks`] when only the assistant's words are to be learned and the template does not mark them.
    pub fn new(
        tokenizer: &'a Tokenizer,
        template: Option<ChatTemplate>,
        learned: Learned,
        (max_length, long): (usize, Long),
        now: Option<LocalTime>,
    ) -> Result<Self> {
        let marks = template.as_ref().is_some_and(ChatTemplate::marks_answers);
        if learned == Learned::Assistant && !marks {
            return Err(Error::NoMarks);
        }
        Ok(Encoder {
            tokenizer,
            template,
            learned,
            now,
            max_length,
            long,
        })
    }

    /// Encodes all samples: for each row one example, or two for a preference, the better one first.
    ///
    /// # Errors
    /// Samples that the template refuses, samples without anything to be learned (how many, and the first), samples that
    /// are too long where that is an error.
    pub fn encode_all(&self, samples: &[(Row, Sample)]) -> Result<(Vec<Vec<Example>>, Report)> {
        let (mut all, mut report) = (Vec::with_capacity(samples.len()), Report::default());
        let mut empty: Option<(usize, String)> = None;
        for (row, sample) in samples {
            let mut examples = self.encode(row, sample)?;
            let longest = examples.iter().map(|e| e.ids.len()).max().unwrap_or(0);
            report.lengths.extend(examples.iter().map(|e| e.ids.len()));
            if longest > self.max_length {
                match self.long {
                    Long::Refuse => {
                        return Err(Error::SampleTooLong {
                            at: row.at(),
                            tokens: longest,
                            most: self.max_length,
                        });
                    }
                    Long::Drop => {
                        report.dropped += 1;
                        continue;
                    }
                    Long::Cut => {
                        report.cut += 1;
                        for example in &mut examples {
                            example.ids.truncate(self.max_length);
                            example.learned.truncate(self.max_length);
                        }
                    }
                }
            }
            if examples.iter().any(|example| example.learned() == 0) {
                empty.get_or_insert_with(|| (0, row.at())).0 += 1;
            }
            report.learned += examples.iter().map(Example::learned).sum::<usize>();
            report.tokens += examples.iter().map(|e| e.ids.len()).sum::<usize>();
            all.push(examples);
        }
        if let Some((count, first)) = empty {
            return Err(Error::NothingLearned {
                count,
                total: samples.len(),
                first,
                most: self.max_length,
            });
        }
        report.lengths.sort_unstable();
        Ok((all, report))
    }

    /// Encodes one sample.
    ///
    /// # Errors
    /// As [`Encoder::encode_all`].
    pub fn encode(&self, row: &Row, sample: &Sample) -> Result<Vec<Example>> {
        Ok(match sample {
            Sample::Text(text) => {
                let mut ids = self.tokenizer.encode(text, true)?;
                self.end(&mut ids)?;
                let learned = vec![true; ids.len()];
                vec![example(ids, learned, true)]
            }
            Sample::Chat { messages, tools } => {
                vec![self.chat(row, messages, tools.as_deref())?]
            }
            Sample::Completion { prompt, completion } => {
                vec![self.pair(row, prompt, completion, true)?]
            }
            Sample::Preference {
                prompt,
                chosen,
                rejected,
            } => vec![
                self.pair(row, prompt, chosen, true)?,
                self.pair(row, prompt, rejected, false)?,
            ],
            Sample::Unpaired {
                prompt,
                completion,
                label,
            } => vec![self.pair(row, prompt, completion, *label)?],
        })
    }

    /// Adds the token that ends a text, if it is not there.
    fn end(&self, ids: &mut Vec<u32>) -> Result<()> {
        let ends = self.tokenizer.eos();
        let end = ends.first().ok_or(Error::NoEndToken)?;
        if ids.last().is_none_or(|last| !ends.contains(last)) {
            ids.push(*end);
        }
        Ok(())
    }

    fn template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or(Error::NoTemplate)
    }

    fn render(
        &self,
        row: &Row,
        messages: &[Value],
        tools: Option<&[Value]>,
        add_generation_prompt: bool,
    ) -> Result<(String, Vec<std::ops::Range<usize>>)> {
        let options = ChatOptions {
            add_generation_prompt,
            tools: tools.map(<[Value]>::to_vec),
            now: self.now,
            ..ChatOptions::default()
        };
        let text = self.template()?.render_marked(messages, &options);
        text.map_err(|source| Error::Chat {
            at: row.at(),
            source,
        })
    }

    fn chat(&self, row: &Row, messages: &[Value], tools: Option<&[Value]>) -> Result<Example> {
        if self.learned == Learned::Completion {
            let Some((last, before)) = messages.split_last() else {
                return Ok(Example::default());
            };
            return self.messages(row, before, std::slice::from_ref(last), tools, true);
        }
        let (text, answers) = self.render(row, messages, tools, false)?;
        let ids = self.tokenizer.encode(&text, false)?;
        let mut learned = vec![self.learned != Learned::Assistant; ids.len()];
        if self.learned == Learned::Assistant {
            self.mark(&text, &answers, &ids, &mut learned)?;
        }
        Ok(example(ids, learned, true))
    }

    /// Marks the tokens of some stretches of a text.
    fn mark(
        &self,
        text: &str,
        stretches: &[std::ops::Range<usize>],
        ids: &[u32],
        learned: &mut [bool],
    ) -> Result<()> {
        for stretch in stretches {
            let at = |end: usize| {
                Ok::<_, Error>(shared(&self.tokenizer.encode(&text[..end], false)?, ids))
            };
            let (begin, end) = (at(stretch.start)?, at(stretch.end)?);
            learned[begin..end.max(begin)].fill(true);
        }
        Ok(())
    }

    /// A prompt and what follows it.
    fn pair(&self, row: &Row, prompt: &Turns, answer: &Turns, label: bool) -> Result<Example> {
        match (prompt, answer) {
            (Turns::Messages(prompt), Turns::Messages(answer)) => {
                self.messages(row, prompt, answer, None, label)
            }
            (Turns::Text(prompt), Turns::Text(answer)) => {
                let read = self.tokenizer.encode(prompt, true)?;
                let mut ids = self.tokenizer.encode(&format!("{prompt}{answer}"), true)?;
                // A tokenizer may end texts by itself: then the prompt alone has an end that the whole has not.
                let begin = shared(&read, &ids);
                if !answer.is_empty() {
                    self.end(&mut ids)?;
                }
                Ok(self.split(ids, begin, label))
            }
            _ => Err(row.error("a prompt of messages and an answer of text, or the reverse")),
        }
    }

    fn messages(
        &self,
        row: &Row,
        prompt: &[Value],
        answer: &[Value],
        tools: Option<&[Value]>,
        label: bool,
    ) -> Result<Example> {
        let all = [prompt, answer].concat();
        let (text, answers) = self.render(row, &all, tools, false)?;
        let ids = self.tokenizer.encode(&text, false)?;
        if self.learned == Learned::Assistant {
            let mut learned = vec![false; ids.len()];
            self.mark(&text, &answers, &ids, &mut learned)?;
            return Ok(example(ids, learned, label));
        }
        let begin = match answer.is_empty() {
            true => ids.len(),
            false => {
                let (read, _) = self.render(row, prompt, tools, true)?;
                shared(&self.tokenizer.encode(&read, false)?, &ids)
            }
        };
        Ok(self.split(ids, begin, label))
    }

    /// What stands before `begin` is read, the rest is learned.
    fn split(&self, ids: Vec<u32>, begin: usize, label: bool) -> Example {
        let all = self.learned == Learned::All;
        let learned = (0..ids.len()).map(|at| all || at >= begin).collect();
        example(ids, learned, label)
    }
}

fn example(ids: Vec<u32>, learned: Vec<bool>, label: bool) -> Example {
    Example {
        ids,
        learned,
        label,
    }
}

/// How many tokens two lists begin with alike.
fn shared(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
