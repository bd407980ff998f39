//! What answers must look like: JSON schemas, regular expressions and grammars, as masks over the vocabulary.

use crate::refusal::Refusal;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use windlass_infer::engine::Constraint;

/// White space between the tokens of JSON: a space, or a line that is indented; no endless row.
const WHITE_SPACE: &str = r" |\n {0,20}";

/// Compiles grammars for one vocabulary.
pub(crate) struct Grammars {
    words: Vec<Vec<u8>>,
    ends: Vec<u32>,
    /// Built when the first grammar comes.
    factory: OnceLock<Result<ParserFactory, String>>,
}

/// A grammar that can be followed.
#[derive(Clone)]
pub(crate) struct Grammar(Arc<Matcher>);

impl Grammars {
    /// For a vocabulary: the bytes of each token and whether it is a control token, and the tokens that end a text.
    pub fn new(tokens: &[(Vec<u8>, bool)], ends: &[u32]) -> Self {
        let mut words: Vec<Vec<u8>> = tokens
            .iter()
            .map(|(bytes, special)| match special {
                true => [&[TokTrie::SPECIAL_TOKEN_MARKER], &bytes[..]].concat(),
                false => bytes.clone(),
            })
            .collect();
        let mut ends = ends.to_vec();
        if ends.is_empty() {
            // A token that the model cannot give: the text ends when nothing can follow.
            ends.push(words.len() as u32);
            words.push(b"\xff<end>".to_vec());
        }
        Grammars {
            words,
            ends,
            factory: OnceLock::new(),
        }
    }

    fn factory(&self) -> Result<&ParserFactory, Refusal> {
        let built = self.factory.get_or_init(|| {
            let info = TokRxInfo::new(self.words.len() as u32, self.ends[0]);
            let trie = TokTrie::from(&info, &self.words).with_eos_tokens(&self.ends);
            let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let mut factory = ParserFactory::new_simple(&environment).map_err(|e| e.to_string())?;
            factory.quiet();
            Ok(factory)
        });
        let built = built.as_ref();
        built.map_err(|error| {
            Refusal::internal(format!("the vocabulary allows no grammars: {error}"))
        })
    }

    fn compile(&self, param: &str, grammar: TopLevelGrammar) -> Result<Grammar, Refusal> {
        let factory = self.factory()?;
        // A grammar comes from outside: what its compiler trips over is the grammar's fault.
        let parser = catch_unwind(AssertUnwindSafe(|| factory.create_parser(grammar)));
        let parser =
            parser.unwrap_or_else(|_| Err(std::io::Error::other("it cannot be compiled").into()));
        let mut matcher = Matcher::new(parser);
        // Errors of a grammar without any text show here.
        let _ = matcher.compute_mask();
        match matcher.get_error() {
            Some(error) => {
                let line = error.lines().next().unwrap_or("");
                Err(Refusal::field(param, format!("cannot be used: {line}")))
            }
            None => Ok(Grammar(Arc::new(matcher))),
        }
    }

    /// JSON that a schema allows; `param` is the field that the schema came in.
    pub fn json_schema(&self, param: &str, schema: &Value) -> Result<Grammar, Refusal> {
        self.compile(
            param,
            TopLevelGrammar::from_json_schema(with_white_space(schema)),
        )
    }

    /// Text that a regular expression matches as a whole.
    pub fn regex(&self, param: &str, pattern: &str) -> Result<Grammar, Refusal> {
        self.compile(param, TopLevelGrammar::from_regex(pattern))
    }

    /// Text of a grammar in Lark's notation.
    pub fn lark(&self, param: &str, grammar: &str) -> Result<Grammar, Refusal> {
        self.compile(param, TopLevelGrammar::from_lark(grammar.to_owned()))
    }

    /// Whether a text is one control token.
    pub fn is_control(&self, text: &str) -> bool {
        let word = [&[TokTrie::SPECIAL_TOKEN_MARKER], text.as_bytes()].concat();
        self.words.contains(&word)
    }
}

/// A schema with the white space that answers may have.
pub(crate) fn with_white_space(schema: &Value) -> Value {
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        other => other.clone(),
    };
    if let Some(schema) = schema.as_object_mut() {
        let options = json!({ "whitespace_pattern": WHITE_SPACE });
        schema.insert("x-guidance".into(), options);
    }
    schema
}

impl Grammar {
    /// The grammar at its beginning, for one sample.
    pub fn constraint(&self) -> Box<dyn Constraint> {
        Box::new(Follower {
            matcher: self.0.deep_clone(),
            mask: Vec::new(),
        })
    }
}

/// A grammar on its way through a text.
struct Follower {
    matcher: Matcher,
    mask: Vec<u32>,
}

impl Constraint for Follower {
    fn mask(&mut self) -> Result<&[u32], String> {
        let mask = self
            .matcher
            .compute_mask_or_eos()
            .map_err(|error| error.to_string())?;
        self.mask.clear();
        self.mask.extend_from_slice(mask.as_slice());
        Ok(&self.mask)
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        self.matcher
            .consume_token(token)
            .map_err(|error| error.to_string())
    }

    fn is_finished(&self) -> bool {
        self.matcher.is_stopped()
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(Follower {
            matcher: self.matcher.deep_clone(),
            mask: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte is a token; 256 ends a text.
    fn grammars() -> Grammars {
        let mut tokens: Vec<(Vec<u8>, bool)> = (0..=255).map(|byte| (vec![byte], false)).collect();
        tokens.push((b"<end>".to_vec(), true));
        Grammars::new(&tokens, &[256])
    }

    /// How much of a text is allowed, and whether it may end there.
    fn follow(grammar: &Grammar, text: &str) -> (usize, bool) {
        let mut follower = grammar.constraint();
        let allowed = |mask: &[u32], id: u32| mask[id as usize / 32] >> (id % 32) & 1 == 1;
        for (at, byte) in text.bytes().enumerate() {
            if follower.is_finished() || !allowed(follower.mask().unwrap(), u32::from(byte)) {
                return (at, follower.is_finished());
            }
            follower.accept(u32::from(byte)).unwrap();
        }
        let end = follower.is_finished() || allowed(follower.mask().unwrap(), 256);
        (text.len(), end)
    }

    #[test]
    fn grammars_allow_what_they_say() {
        let grammars = grammars();
        let schema = json!({
            "type": "object",
            "properties": { "a": { "type": "integer" }, "b": { "enum": ["x", "y"] } },
            "required": ["a", "b"],
            "additionalProperties": false,
        });
        let json = grammars.json_schema("s", &schema).unwrap();
        let regex = grammars.regex("r", "[a-c]{2,3}").unwrap();
        let lark = grammars
            .lark("g", "start: \"ab\" NUMBER\nNUMBER: /[0-9]+/")
            .unwrap();
        for (grammar, text, expected) in [
            (&json, r#"{"a": 12, "b": "y"}"#, (19, true)),
            (&json, r#"{"a":1,"b":"x"}"#, (15, true)),
            (&json, "{\n  \"a\": 1", (10, false)),
            (&json, r#"{"b""#, (2, false)),
            (&json, r#"{"a": 1, "b": "z""#, (15, false)),
            (&regex, "abd", (2, true)),
            (&regex, "abcc", (3, true)),
            (&lark, "ab12", (4, true)),
            (&lark, "ac", (1, false)),
        ] {
            let got = follow(grammar, text);
            assert_eq!(got.0, expected.0, "{text}");
            if got.0 == text.len() {
                assert_eq!(got.1, expected.1, "{text}");
            }
        }
    }

    #[test]
    fn what_is_no_grammar_is_refused_by_field() {
        let grammars = grammars();
        for (refused, param) in [
            (
                grammars.json_schema("s", &json!({ "type": "strange" })),
                "s",
            ),
            (
                grammars.json_schema("s", &json!({ "type": "string", "pattern": "(" })),
                "s",
            ),
            (
                grammars.json_schema("s", &json!({ "$ref": "#/nowhere" })),
                "s",
            ),
            (grammars.regex("r", "(["), "r"),
            (grammars.lark("g", "start: nowhere"), "g"),
        ] {
            let refusal = refused.map(|_| ()).unwrap_err();
            assert_eq!(refusal.status.as_u16(), 400);
            assert_eq!(refusal.param.as_deref(), Some(param), "{}", refusal.message);
        }
    }
}
