//! How well a model predicts: perplexity of a text, and which answer of several it finds likeliest.
//!
//! Text is read by windows that fit the model's context, several of them in one pass; a window's result does not
//! depend on its neighbors in the pass.

use crate::{InferError, LoadedModel};
use serde::Serialize;
use serde_json::Value;
use windlass_model::Goal;
use windlass_tensor::IGNORED;

/// Tokens of one pass through the model, where windows are shorter.
pub(crate) const PASS_TOKENS: usize = 2048;

/// How well a text was predicted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Perplexity {
    /// `exp(loss)`.
    pub perplexity: f64,
    /// The standard error of it that the spread of the losses gives.
    pub error: f64,
    /// Mean of `-log p` over the scored tokens, in nats.
    pub loss: f64,
    /// Tokens scored.
    pub scored_tokens: usize,
    /// Tokens of the text.
    pub tokens: usize,
    /// Tokens that a window holds.
    pub window: usize,
    /// Tokens from the start of one window to the start of the next, where they overlap and every token is scored once;
    /// `None` where the second halves of windows are scored.
    pub stride: Option<usize>,
    /// Windows read.
    pub windows: usize,
}

/// Sums of some numbers.
#[derive(Clone, Copy, Default)]
pub(crate) struct Moments {
    count: usize,
    sum: f64,
    squares: f64,
}

impl Moments {
    pub fn add(&mut self, value: f64) {
        self.count += 1;
        self.sum += value;
        self.squares += value * value;
    }

    pub fn mean(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }

    /// The standard error of the mean.
    pub fn error(&self) -> f64 {
        if self.count < 2 {
            return 0.0;
        }
        let variance = self.squares / self.count as f64 - self.mean() * self.mean();
        (variance.max(0.0) / (self.count - 1) as f64).sqrt()
    }

    /// The perplexity, where the numbers are losses.
    pub fn perplexity(
        &self,
        tokens: usize,
        window: usize,
        stride: Option<usize>,
        windows: usize,
    ) -> Perplexity {
        Perplexity {
            perplexity: self.mean().exp(),
            error: self.mean().exp() * self.error(),
            loss: self.mean(),
            scored_tokens: self.count,
            tokens,
            window,
            stride,
            windows,
        }
    }
}

/// One window: which tokens it reads, and from which on they are scored.
struct Window {
    start: usize,
    end: usize,
    scored_from: usize,
}

/// `exp` of the mean loss over a text read by windows of `window` tokens, each starting `stride` tokens after the last.
/// A token is scored once, in the first window that holds it, given the tokens before it in that window: with a small
/// stride at least `window - stride` of them. The first token of a window has none and is scored in none, so with
/// `stride == window` one token of each window is left out.
///
/// `tell` hears after each pass how many tokens are done, and the mean loss so far.
///
/// # Errors
/// [`InferError::Setting`] when window or stride are impossible, [`InferError::Empty`] below two tokens,
/// [`InferError::UnknownToken`].
///
/// # Source
/// Hugging Face transformers documentation, "Perplexity of fixed-length models".
pub fn perplexity(
    model: &LoadedModel,
    ids: &[u32],
    window: usize,
    stride: usize,
    tell: &mut dyn FnMut(usize, f64),
) -> Result<Perplexity, InferError> {
    check_window(model, window, stride)?;
    if ids.len() < 2 {
        return Err(InferError::Empty {
            what: "the text",
            hint: "a text of at least two tokens is needed",
        });
    }
    model.check_ids(ids)?;
    let mut windows = Vec::new();
    let mut scored_from = 0;
    for start in (0..ids.len()).step_by(stride) {
        let end = (start + window).min(ids.len());
        windows.push(Window {
            start,
            end,
            scored_from: scored_from.max(start + 1),
        });
        scored_from = end;
        if end == ids.len() {
            break;
        }
    }
    let mut scored = Moments::default();
    for pass in windows.chunks((PASS_TOKENS / window).max(1)) {
        let sequences = pass
            .iter()
            .map(|w| (&ids[w.start..w.end], w.scored_from - w.start));
        let losses = losses(model, &sequences.collect::<Vec<_>>());
        losses.iter().flatten().for_each(|loss| scored.add(*loss));
        tell(pass[pass.len() - 1].end, scored.mean());
    }
    Ok(scored.perplexity(ids.len(), window, Some(stride), windows.len()))
}

fn check_window(model: &LoadedModel, window: usize, stride: usize) -> Result<(), InferError> {
    let refuse = |flag, value: usize, rule, hint| {
        Err(InferError::Setting {
            flag,
            value: value.to_string(),
            rule,
            hint,
        })
    };
    if window < 2 || window > model.context() {
        let rule = "2 or more, and at most the context of the model (max_position_embeddings)";
        return refuse(
            "window",
            window,
            rule,
            "leave out the flag to use the whole context",
        );
    }
    if stride == 0 || stride > window {
        let rule = "1 or more, and at most the window";
        let hint = "half the window is usual; the window itself is fastest";
        return refuse("stride", stride, rule, hint);
    }
    Ok(())
}

/// The losses of the tokens of each sequence from index `from` (1 or more) on, all sequences in one pass.
pub(crate) fn losses(model: &LoadedModel, sequences: &[(&[u32], usize)]) -> Vec<Vec<f64>> {
    let ids: Vec<u32> = sequences
        .iter()
        .flat_map(|(ids, _)| *ids)
        .copied()
        .collect();
    let lengths: Vec<usize> = sequences.iter().map(|(ids, _)| ids.len()).collect();
    let targets = sequences.iter().flat_map(|&(ids, from)| {
        (1..=ids.len()).map(move |next| match next >= from && next < ids.len() {
            true => ids[next] as i64,
            false => IGNORED,
        })
    });
    let targets = targets.collect();
    let batch = model.whole(ids, &lengths, Goal::TokenLosses { targets });
    let losses = model.run(&batch, true).to_f64();
    let mut start = 0;
    let parts = sequences.iter().map(|(ids, from)| {
        start += ids.len();
        losses[start - ids.len() + from - 1..start - 1].to_vec()
    });
    parts.collect()
}

/// A question with answers to choose from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The text before the answer.
    pub prompt: String,
    /// The answers, each as it continues the prompt.
    pub choices: Vec<String>,
    /// Index of the right one.
    pub answer: usize,
}

/// The questions of a JSONL file: an object a line, with `question`, `context`, `prompt` or `query` (a text), `choices`
/// or `endings` (two texts or more), and `answer`, `label` or `gold` (an index from 0, as a number or in quotes, or a
/// letter from A). `file` is for messages.
///
/// # Errors
/// [`InferError::Question`] names the line; [`InferError::Empty`] without a question.
pub fn parse_questions(file: &str, text: &str) -> Result<Vec<Question>, InferError> {
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    let questions: Result<Vec<Question>, InferError> = lines
        .map(|(index, line)| {
            Question::from_json(line).map_err(|problem| InferError::Question {
                file: file.to_owned(),
                line: index + 1,
                problem,
            })
        })
        .collect();
    let questions = questions?;
    if questions.is_empty() {
        return Err(InferError::Empty {
            what: "the file of questions",
            hint: "give a file with one JSON object a line",
        });
    }
    Ok(questions)
}

impl Question {
    fn from_json(line: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(line).map_err(|error| error.to_string())?;
        let find = |keys: &[&str]| {
            let found = keys.iter().find_map(|key| value.get(key));
            found.ok_or_else(|| format!("none of the keys {}", keys.join(", ")))
        };
        let prompt = find(&["question", "context", "prompt", "query"])?;
        let prompt = prompt
            .as_str()
            .ok_or("the question is not a text")?
            .to_owned();
        let choices = find(&["choices", "endings"])?.as_array();
        let choices =
            choices.and_then(|list| list.iter().map(|c| c.as_str().map(str::to_owned)).collect());
        let choices: Vec<String> = choices.ok_or("the choices are not a list of texts")?;
        if choices.len() < 2 || choices.iter().any(String::is_empty) {
            return Err("there must be two choices or more, none of them empty".into());
        }
        let answer = find(&["answer", "label", "gold"])?;
        let index = match answer {
            Value::String(text) => match text.as_bytes() {
                [letter @ b'A'..=b'Z'] => Some((letter - b'A') as usize),
                _ => text.parse().ok(),
            },
            other => other.as_u64().map(|index| index as usize),
        };
        match index.filter(|&index| index < choices.len()) {
            Some(answer) => Ok(Question {
                prompt,
                choices,
                answer,
            }),
            None => Err(format!(
                "the answer {answer} names none of {} choices",
                choices.len()
            )),
        }
    }
}

/// How likely one answer is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ChoiceScore {
    /// `log p(choice | prompt)`, in nats.
    pub log_likelihood: f64,
    /// The same for each token.
    pub per_token: f64,
    /// The same for each byte of the text.
    pub per_byte: f64,
    /// Tokens of the choice.
    pub tokens: usize,
}

impl LoadedModel {
    /// Scores the choices of a question. The choice is joined to the prompt by a space where neither has one; its
    /// tokens are those of the joint text that differ from the prompt's own.
    ///
    /// # Errors
    /// [`InferError::TooLong`] when prompt and choice exceed the context; no tokenizer.
    pub fn score_choices(&self, question: &Question) -> Result<Vec<ChoiceScore>, InferError> {
        let prompt = self.encode(&question.prompt)?;
        let mut sequences = Vec::new();
        for choice in &question.choices {
            let whole = self.encode(&join(&question.prompt, choice))?;
            // Something must stand before the first token scored: the token that begins a text.
            let alone = whole.len() == 1 || question.prompt.is_empty() && whole[0] != prompt[0];
            let whole = match alone {
                true => [self.encode("")?, whole].concat(),
                false => whole,
            };
            if whole.len() > self.context() {
                return Err(InferError::TooLong {
                    what: format!("the question with the choice {choice:?}"),
                    tokens: whole.len(),
                    context: self.context(),
                });
            }
            let common = whole
                .iter()
                .zip(&prompt)
                .take_while(|(a, b)| a == b)
                .count();
            let from = common.clamp(1, whole.len() - 1);
            sequences.push((whole, from));
        }
        let borrowed: Vec<(&[u32], usize)> = sequences
            .iter()
            .map(|(ids, from)| (&ids[..], *from))
            .collect();
        let scores = losses(self, &borrowed).into_iter().zip(&question.choices);
        let scores = scores.map(|(losses, choice)| {
            let log_likelihood = -losses.iter().sum::<f64>();
            ChoiceScore {
                log_likelihood,
                per_token: log_likelihood / losses.len() as f64,
                per_byte: log_likelihood / choice.len() as f64,
                tokens: losses.len(),
            }
        });
        Ok(scores.collect())
    }
}

fn join(prompt: &str, choice: &str) -> String {
    let spaced = prompt.is_empty()
        || prompt.ends_with(char::is_whitespace)
        || choice.starts_with(char::is_whitespace);
    format!("{prompt}{}{choice}", if spaced { "" } else { " " })
}

/// The share of questions answered rightly, by three ways to compare answers of different lengths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Accuracy {
    /// Questions.
    pub questions: usize,
    /// By the log-likelihood itself.
    pub accuracy: f64,
    /// By the log-likelihood of a token.
    pub accuracy_per_token: f64,
    /// By the log-likelihood of a byte.
    pub accuracy_per_byte: f64,
}

/// Counts right answers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    questions: usize,
    right: [usize; 3],
}

impl Tally {
    /// Adds the scores of a question's choices; of equal ones the first counts as chosen.
    pub fn add(&mut self, scores: &[ChoiceScore], answer: usize) {
        let measures: [fn(&ChoiceScore) -> f64; 3] =
            [|s| s.log_likelihood, |s| s.per_token, |s| s.per_byte];
        self.questions += 1;
        for (right, measure) in self.right.iter_mut().zip(measures) {
            let best = scores
                .iter()
                .enumerate()
                .rev()
                .max_by(|a, b| measure(a.1).total_cmp(&measure(b.1)));
            *right += usize::from(best.is_some_and(|(index, _)| index == answer));
        }
    }

    /// The shares so far.
    pub fn accuracy(&self) -> Accuracy {
        let share = |right: usize| right as f64 / self.questions.max(1) as f64;
        Accuracy {
            questions: self.questions,
            accuracy: share(self.right[0]),
            accuracy_per_token: share(self.right[1]),
            accuracy_per_byte: share(self.right[2]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_read_in_their_usual_forms() {
        let text = r#"
            {"question": "1 + 1 =", "choices": ["3", "2"], "answer": 1}
            {"context": "He", "endings": [" ran", " blue", "!"], "label": "2"}
            {"query": "", "choices": ["a", "b"], "gold": "B"}
        "#;
        let questions = parse_questions("q", text).unwrap();
        let shape = |q: &Question| (q.prompt.clone(), q.choices.len(), q.answer);
        let shapes: Vec<_> = questions.iter().map(shape).collect();
        let expected = [("1 + 1 =", 2, 1), ("He", 3, 2), ("", 2, 1)];
        assert_eq!(shapes, expected.map(|(p, n, a)| (p.to_owned(), n, a)));
    }

    #[test]
    fn other_lines_are_refused_by_number() {
        for (line, expected) in [
            ("{", "q: line 2: EOF"),
            ("[]", "none of the keys question, context"),
            (r#"{"question": 1}"#, "the question is not a text"),
            (r#"{"question": "a"}"#, "none of the keys choices, endings"),
            (
                r#"{"question": "a", "choices": [1, 2]}"#,
                "not a list of texts",
            ),
            (
                r#"{"question": "a", "choices": ["b"]}"#,
                "two choices or more",
            ),
            (
                r#"{"question": "a", "choices": ["b", "c"]}"#,
                "none of the keys answer",
            ),
            (
                r#"{"question": "a", "choices": ["b", "c"], "answer": 2}"#,
                "the answer 2 names none of 2",
            ),
            (
                r#"{"question": "a", "choices": ["b", "c"], "label": -1}"#,
                "the answer -1 names none",
            ),
        ] {
            let error = parse_questions("q", &format!("\n{line}\n")).unwrap_err();
            assert!(
                error.to_string().contains(expected),
                "{error} against {expected}"
            );
            assert!(error.to_string().contains("line 2") && error.hint().is_some());
        }
        assert!(parse_questions("q", " \n").unwrap_err().hint().is_some());
    }

    #[test]
    fn the_likeliest_choice_counts_by_each_measure() {
        let score = |log_likelihood: f64, tokens: usize, bytes: f64| ChoiceScore {
            log_likelihood,
            per_token: log_likelihood / tokens as f64,
            per_byte: log_likelihood / bytes,
            tokens,
        };
        let mut tally = Tally::default();
        tally.add(&[score(-4.0, 1, 2.0), score(-6.0, 2, 2.0)], 0);
        tally.add(&[score(-4.0, 1, 4.0), score(-4.0, 1, 4.0)], 0);
        let expected = Accuracy {
            questions: 2,
            accuracy: 1.0,
            accuracy_per_token: 0.5,
            accuracy_per_byte: 1.0,
        };
        assert_eq!(tally.accuracy(), expected);
    }
}
