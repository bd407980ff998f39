//! Text to token ids and back: tokenizers of Hugging Face folders, GGUF files and SentencePiece models, and a trainer.
//!
//! A wrapper over the `tokenizers` crate that adds what a language model needs around it: the
//! end-of-text and beginning-of-text ids, vocabularies of other files, decoding that streams, and a byte-level
//! BPE trainer. It knows nothing of chat templates, and it reads no GGUF files, only what is in them.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, DecoderWrapper, PreTokenizerWrapper};

mod bytes;
mod charsmap;
mod definition;
mod error;
mod export;
mod gguf;
mod pieces;
mod pre;
mod sentencepiece;
mod spm;
mod stream;
mod vocabulary;

pub use error::TokenizerError;
pub use pieces::split_point;
pub use stream::DecodeStream;
pub use vocabulary::{GgufVocabulary, TokenType};

use pieces::is_splittable;
use spm::Spm;

/// The name of the file that defines a tokenizer in a Hugging Face folder.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// The name of a SentencePiece model in a Hugging Face folder.
const SENTENCEPIECE_FILE: &str = "tokenizer.model";

/// The files beside [`TOKENIZER_FILE`] that travel with it.
const COMPANIONS: [&str; 4] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];

/// Tokens that end a text by convention, for a bare `tokenizer.json` whose configuration does not say.
const KNOWN_ENDS: [&str; 5] = ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]"];

/// A tokenizer with its special ids and the files it came from.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The same, reading control tokens in a text as text; built when it is first needed.
    unmarked: OnceLock<tokenizers::Tokenizer>,
    vocab_size: usize,
    bos: Option<u32>,
    pad: Option<u32>,
    eos: Vec<u32>,
    splittable: bool,
    /// File name and content, [`TOKENIZER_FILE`] first: what [`Tokenizer::save`] writes. Of a vocabulary without
    /// such files they are made when they are first needed.
    files: OnceLock<Vec<(String, Vec<u8>)>>,
    /// Where the tokenizer came from, if not from a `tokenizer.json`.
    origin: Option<Arc<Origin>>,
}

/// What a tokenizer keeps of the vocabulary it was built from.
#[derive(Debug)]
struct Origin {
    vocabulary: GgufVocabulary,
    /// What encodes in place of the library, where it does.
    spm: Option<Spm>,
    /// The tokens before and after a text.
    around: (Vec<u32>, Vec<u32>),
    notes: Vec<String>,
}

impl Tokenizer {
    /// Loads a tokenizer from a `tokenizer.json`, from a Hugging Face folder, or from a SentencePiece model
    /// (`tokenizer.model`, read where a folder has no `tokenizer.json`).
    ///
    /// The ids that end a text are those of `eos_token` in `tokenizer_config.json` (or
    /// `special_tokens_map.json`) first, then `eos_token_id` of `generation_config.json` and `config.json`. When none
    /// of these names one, it is the first special token of the conventional ones: `<|endoftext|>`, `</s>`,
    /// `<|end_of_text|>`, `<eos>`, `[EOS]`.
    ///
    /// # Errors
    /// [`TokenizerError::Missing`] without a `tokenizer.json`, [`TokenizerError::Invalid`] when a file cannot be
    /// parsed, [`TokenizerError::Io`] when it cannot be read.
    pub fn load(path: &Path) -> Result<Self, TokenizerError> {
        let file = if path.is_dir() {
            path.join(TOKENIZER_FILE)
        } else {
            path.to_owned()
        };
        let folder = file.parent().unwrap_or(Path::new("."));
        let mut companions = Vec::new();
        for name in COMPANIONS {
            let companion = folder.join(name);
            if companion.is_file() {
                companions.push((name.to_owned(), read(&companion)?));
            }
        }
        let pieces = match file.extension() {
            Some(end) if end == "json" => folder.join(SENTENCEPIECE_FILE),
            _ => file.clone(),
        };
        if pieces.is_file() && (pieces == file || !file.is_file()) {
            return Self::from_sentencepiece(&pieces, companions);
        }
        if !file.is_file() {
            return Err(TokenizerError::Missing {
                folder: folder.to_owned(),
            });
        }
        let mut files = vec![(TOKENIZER_FILE.to_owned(), read(&file)?)];
        files.append(&mut companions);
        let mut configs = Vec::new();
        for name in ["generation_config.json", "config.json"] {
            let config = folder.join(name);
            if config.is_file() {
                configs.push(parse(&config, &read(&config)?)?);
            }
        }
        Self::from_files(files, &configs, folder)
    }

    /// Builds a tokenizer from the contents of its files and the model's configurations.
    fn from_files(
        files: Vec<(String, Vec<u8>)>,
        configs: &[Value],
        folder: &Path,
    ) -> Result<Self, TokenizerError> {
        let path = folder.join(&files[0].0);
        let definition = parse(&path, &files[0].1)?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&files[0].1).map_err(|error| {
            TokenizerError::Invalid {
                path,
                reason: error.to_string(),
            }
        })?;
        // Padding and truncation of a saved pipeline would silently change a text's tokens.
        inner.with_padding(None);
        let untruncated = inner.with_truncation(None);
        untruncated.map_err(|error| failed("be set up", &*error))?;

        let mut tokenizer = Self {
            vocab_size: inner
                .get_vocab(true)
                .values()
                .max()
                .map_or(0, |&id| id as usize + 1),
            splittable: is_splittable(&definition),
            inner,
            unmarked: OnceLock::new(),
            bos: None,
            pad: None,
            eos: Vec::new(),
            files: OnceLock::new(),
            origin: None,
        };
        for (name, content) in &files[1..] {
            if name == "tokenizer_config.json" || name == "special_tokens_map.json" {
                let config = parse(&folder.join(name), content)?;
                tokenizer.add_special(&config);
            }
        }
        for config in configs {
            tokenizer.add_special(config);
        }
        if tokenizer.eos.is_empty() {
            let added = tokenizer.inner.get_added_tokens_decoder();
            let is_special = |end: &&str| {
                added
                    .values()
                    .any(|token| token.special && token.content == **end)
            };
            let end = KNOWN_ENDS.iter().find(|end| is_special(end));
            tokenizer.eos.extend(end.and_then(|end| tokenizer.id(end)));
        }
        tokenizer.files = files.into();
        Ok(tokenizer)
    }

    /// Takes over special ids of a configuration, given as tokens or as ids; what is known already stays.
    fn add_special(&mut self, config: &Value) {
        let ids = |name: &str| -> Vec<u32> {
            let token = match &config[format!("{name}_token")] {
                Value::String(token) => Some(token.as_str()),
                other => other["content"].as_str(),
            };
            let by_token = token.and_then(|token| self.inner.token_to_id(token));
            let by_id = match &config[format!("{name}_token_id")] {
                Value::Array(ids) => ids.iter().filter_map(Value::as_u64).collect(),
                id => id.as_u64().into_iter().collect::<Vec<_>>(),
            };
            let by_id = by_id.into_iter().filter_map(|id| u32::try_from(id).ok());
            by_token.into_iter().chain(by_id).collect()
        };
        let (bos, pad, eos) = (ids("bos"), ids("pad"), ids("eos"));
        self.bos = self.bos.or(bos.first().copied());
        self.pad = self.pad.or(pad.first().copied());
        for id in eos {
            if !self.eos.contains(&id) {
                self.eos.push(id);
            }
        }
    }

    /// Trains a byte-level BPE tokenizer on `texts`.
    ///
    /// Every byte is a token, so any text can be encoded; digits stay alone, so that numbers are read digit by
    /// digit. Id 0 is `end`, the token that ends (and, for `bos_token`, begins) a text. The result depends on the
    /// texts alone. A small corpus can yield fewer than `vocab_size` tokens: ask [`Tokenizer::vocab_size`]. Words
    /// are counted on all cores (by the `tokenizers` crate).
    ///
    /// # Errors
    /// [`TokenizerError::TooSmall`] below 257 tokens, [`TokenizerError::Failed`] when training fails.
    pub fn train<S: AsRef<str> + Send>(
        texts: impl Iterator<Item = S> + Send,
        vocab_size: usize,
        end: &str,
    ) -> Result<Self, TokenizerError> {
        let alphabet = ByteLevel::alphabet();
        let least = alphabet.len() + 1;
        if vocab_size < least {
            return Err(TokenizerError::TooSmall {
                asked: vocab_size,
                least,
            });
        }
        let trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(vocab_size)
            .min_frequency(2)
            .initial_alphabet(alphabet.into_iter().collect())
            .special_tokens(vec![AddedToken::from(end, true)])
            .build();
        let bytes = ByteLevel::new(false, true, true);
        let mut inner = tokenizers::Tokenizer::new(BPE::default());
        inner
            .with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(Sequence::new(vec![
                PreTokenizerWrapper::Digits(Digits::new(true)),
                PreTokenizerWrapper::ByteLevel(bytes),
            ]))))
            .with_decoder(Some(DecoderWrapper::ByteLevel(bytes)));
        inner
            .train(&mut TrainerWrapper::BpeTrainer(trainer), texts)
            .map_err(|error| failed("be trained", &*error))?;
        let definition = inner
            .to_string(true)
            .map_err(|error| failed("be saved", &*error))?;
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            "clean_up_tokenization_spaces": false,
        });
        let special = json!({ "bos_token": end, "eos_token": end });
        let files = vec![
            (TOKENIZER_FILE.to_owned(), definition.into_bytes()),
            (COMPANIONS[0].to_owned(), pretty(&config)),
            (COMPANIONS[1].to_owned(), pretty(&special)),
        ];
        Self::from_files(files, &[], Path::new(""))
    }

    /// Writes `tokenizer.json` and the files that belong to it into `folder`, byte for byte as they were loaded.
    ///
    /// Of a GGUF vocabulary they are made: for byte-level BPE, WordPiece and Unigram they are the pipeline itself. For
    /// SentencePiece BPE the scores become a list of merges, as Hugging Face's converter has it; runs of one repeated
    /// character may then be cut elsewhere.
    ///
    /// # Errors
    /// [`TokenizerError::Io`] when a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), TokenizerError> {
        for (name, content) in self.files() {
            let path = folder.join(name);
            std::fs::write(&path, content).map_err(|source| TokenizerError::Io {
                action: "write",
                path,
                source,
            })?;
        }
        Ok(())
    }

    /// File names and contents of the tokenizer, `tokenizer.json` first.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let files = self.files.get_or_init(|| definition::files(self));
        let files = files.iter();
        files.map(|(name, content)| (name.as_str(), content.as_slice()))
    }

    /// The content of `tokenizer.json`: what decides how a text is encoded.
    pub fn definition(&self) -> &[u8] {
        let mut files = self.files();
        files.next().map_or(&[], |(_, content)| content)
    }

    /// The number of ids: the largest id plus one (ids may have gaps).
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The ids that end a text; the first is the one to put after a document. Empty when none is declared.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The id that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The id that fills a batch up.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// The id of a token, special ones included.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, in the vocabulary's own spelling (`Ġthe`, `▁the`).
    pub fn token(&self, id: u32) -> Option<String> {
        // The library would give an added token as its normalizer changes it.
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let added = added.get(&id).map(|token| token.content.clone());
        added.or_else(|| self.inner.id_to_token(id))
    }

    /// Checks that a model with `vocab_size` embeddings has one for every id.
    ///
    /// # Errors
    /// [`TokenizerError::LargerThanModel`] when it has not. A larger model is fine: many are padded.
    pub fn check_vocabulary(&self, vocab_size: usize) -> Result<(), TokenizerError> {
        if self.vocab_size > vocab_size {
            return Err(TokenizerError::LargerThanModel {
                tokenizer: self.vocab_size,
                model: vocab_size,
            });
        }
        Ok(())
    }

    /// The ids of `text`; with `special`, inside what the tokenizer puts around a text (Llama's leading `<s>`).
    ///
    /// # Errors
    /// [`TokenizerError::Failed`] when the library refuses the text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        self.encode_with(text, special, true)
    }

    /// As [`Tokenizer::encode`]; without `marks`, control tokens that are spelled in `text` are text like any other,
    /// so that what a user types cannot end a message.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`] when the library refuses the text.
    pub fn encode_with(
        &self,
        text: &str,
        special: bool,
        marks: bool,
    ) -> Result<Vec<u32>, TokenizerError> {
        let origin = self.origin.as_deref();
        let mut ids = match origin.and_then(|origin| origin.spm.as_ref()) {
            Some(spm) => spm.encode(text, marks),
            None => {
                let pipeline = if marks { &self.inner } else { self.unmarked() };
                let encoding = pipeline.encode_fast(text, special && origin.is_none());
                let encoding = encoding.map_err(|error| failed("encode", &*error))?;
                encoding.get_ids().to_vec()
            }
        };
        if let (true, Some(origin)) = (special, origin) {
            let (before, after) = &origin.around;
            ids.splice(0..0, before.iter().copied());
            ids.extend(after);
        }
        Ok(ids)
    }

    fn unmarked(&self) -> &tokenizers::Tokenizer {
        self.unmarked.get_or_init(|| {
            let mut pipeline = self.inner.clone();
            pipeline.set_encode_special_tokens(true);
            pipeline
        })
    }

    /// The GGUF vocabulary that the tokenizer was built from, if it was.
    pub fn vocabulary(&self) -> Option<&GgufVocabulary> {
        self.origin.as_ref().map(|origin| &origin.vocabulary)
    }

    /// What the user should know about the vocabulary: entries that are not used.
    pub fn notes(&self) -> &[String] {
        self.origin.as_ref().map_or(&[], |origin| &origin.notes)
    }

    /// The text of `ids`; with `skip_special`, without special tokens.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`] when the library cannot decode.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        let text = self.inner.decode(ids, skip_special);
        text.map_err(|error| failed("decode", &*error))
    }

    /// A decoder that takes one id at a time.
    pub fn stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// Whether a long text may be encoded in pieces cut at a [`split_point`] without changing its tokens.
    ///
    /// True for byte-level tokenizers whose words never cross such a point; false for SentencePiece-like ones.
    pub fn splittable(&self) -> bool {
        self.splittable
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TokenizerError> {
    std::fs::read(path).map_err(|source| TokenizerError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    })
}

fn parse(path: &Path, content: &[u8]) -> Result<Value, TokenizerError> {
    serde_json::from_slice(content).map_err(|error| TokenizerError::Invalid {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

fn failed(action: &'static str, error: &dyn std::error::Error) -> TokenizerError {
    TokenizerError::Failed {
        action,
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn data() -> Option<PathBuf> {
        let folder = std::env::var_os("WINDLASS_TEST_DATA").map(PathBuf::from);
        if folder.is_none() {
            println!("skipped: set WINDLASS_TEST_DATA");
        }
        folder
    }

    const TEXTS: [&str; 6] = [
        "Hello, world! It's 12 + 30 = 42.\n\n  Indented  twice \n",
        "naïve café — “quotes” … ½ №5",
        "中文，日本語、한국어。🙂👩‍👩‍👧‍👦🏳️‍🌈",
        " leading and trailing ",
        "a\u{301}e\u{300} ﷺ \t tab\r\nline",
        "Once upon a time, there was a little girl named Lily.",
    ];

    /// Streamed pieces put together must be the text decoded at once, and no piece may hold half a character.
    fn check_stream(tokenizer: &Tokenizer, text: &str) {
        let ids = tokenizer.encode(text, false).unwrap();
        let whole = tokenizer.decode(&ids, true).unwrap();
        let mut stream = tokenizer.stream(true);
        let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        assert_eq!(pieces.concat(), whole, "{text:?}");
        assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')));
    }

    /// Cutting a text at its split points must not change its tokens.
    fn check_split(tokenizer: &Tokenizer, text: &str) {
        let whole = tokenizer.encode(text, false).unwrap();
        let (mut pieces, mut rest, mut cuts) = (Vec::new(), text, 0);
        while !rest.is_empty() {
            let windows = (300..rest.len()).step_by(300);
            let mut cut_points =
                windows.filter_map(|window| split_point(&rest[..rest.ceil_char_boundary(window)]));
            let cut = cut_points.find(|&cut| cut > 0).unwrap_or(rest.len());
            pieces.extend(tokenizer.encode(&rest[..cut], false).unwrap());
            rest = &rest[cut..];
            cuts += 1;
        }
        assert!(cuts > 2, "the text was cut {cuts} times only");
        assert!(pieces == whole, "tokens changed at a cut");
    }

    #[test]
    fn trained_tokenizers_are_deterministic_and_reversible() {
        let texts: Vec<String> = (0..200)
            .map(|i| format!("Tom has {i} red balls. {} + {i} = {}.\n", i + 1, 2 * i + 1))
            .collect();
        let train = |size| Tokenizer::train(texts.iter(), size, "<|end|>");
        let tokenizer = train(300).unwrap();
        assert_eq!(tokenizer.definition(), train(300).unwrap().definition());
        assert!(tokenizer.vocab_size() <= 300 && tokenizer.vocab_size() > 270);
        assert_eq!((tokenizer.eos(), tokenizer.bos()), (&[0][..], Some(0)));
        assert_eq!(tokenizer.id("<|end|>"), Some(0));
        assert!(tokenizer.splittable());
        let digits = tokenizer.encode("4217", false).unwrap();
        assert_eq!(digits.len(), 4);
        for text in TEXTS {
            let ids = tokenizer.encode(text, true).unwrap();
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
            check_stream(&tokenizer, text);
        }
        check_split(&tokenizer, &texts.concat());

        let folder =
            std::env::temp_dir().join(format!("windlass-tokenizer-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        tokenizer.save(&folder).unwrap();
        let eos = r#"{"eos_token_id": [0, 7, 9], "bos_token_id": 5}"#;
        std::fs::write(folder.join("generation_config.json"), eos).unwrap();
        let loaded = Tokenizer::load(&folder).unwrap();
        assert_eq!(loaded.eos(), [0, 7, 9]);
        assert_eq!(loaded.bos(), Some(0));
        assert!(loaded.files().eq(tokenizer.files()));

        let hint = |error: TokenizerError| (error.to_string(), error.hint().unwrap());
        let (message, _) = hint(train(100).unwrap_err());
        assert!(message.contains("at least 257"), "{message}");
        let (message, advice) = hint(loaded.check_vocabulary(256).unwrap_err());
        assert!(
            message.contains("256") && advice.contains("at least"),
            "{message} {advice}"
        );
        std::fs::write(folder.join(TOKENIZER_FILE), "{\"version\": ").unwrap();
        let (message, _) = hint(Tokenizer::load(&folder).unwrap_err());
        assert!(message.contains(TOKENIZER_FILE), "{message}");
        std::fs::remove_file(folder.join(TOKENIZER_FILE)).unwrap();
        let (message, advice) = hint(Tokenizer::load(&folder).unwrap_err());
        assert!(message.contains(TOKENIZER_FILE) && advice.contains("--tokenizer"));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn broken_bytes_are_passed_on_in_the_end() {
        let tokenizer = Tokenizer::train(["a b"].iter(), 257, "<|end|>").unwrap();
        let half = &tokenizer.encode("中a", false).unwrap()[1..];
        let mut stream = tokenizer.stream(true);
        let mut text = String::new();
        for &id in half.iter().cycle().take(30) {
            text += &stream.push(id).unwrap();
        }
        text += &stream.finish().unwrap();
        assert_eq!(text.matches('a').count(), 10);
        let lead = tokenizer.encode("中", false).unwrap()[0];
        let mut stream = tokenizer.stream(true);
        assert_eq!(stream.push(lead).unwrap(), "");
        assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    }

    #[test]
    fn published_tokenizers_stream_and_split() {
        let Some(data) = data() else { return };
        let corpus = |path: &str, bytes: usize| {
            let text = std::fs::read_to_string(data.join("corpora").join(path)).unwrap();
            text[..text.floor_char_boundary(bytes)].to_owned()
        };
        let english = corpus("tinyshakespeare/input.txt", 60_000);
        let chinese = corpus("zh/hongloumeng.txt", 60_000);
        let stories = corpus("wikitext-2/wiki.test.raw", 60_000);
        for (name, bos, eos, splittable) in [
            ("gpt2", None, Some(50256), true),
            ("minimind", Some(1), Some(2), true),
            ("llama2", None, Some(2), false),
        ] {
            let tokenizer = Tokenizer::load(&data.join("tokenizers").join(name)).unwrap();
            assert_eq!(
                (tokenizer.bos(), tokenizer.eos().first().copied()),
                (bos, eos),
                "{name}"
            );
            assert_eq!(tokenizer.splittable(), splittable, "{name}");
            for text in TEXTS {
                check_stream(&tokenizer, text);
            }
            if splittable {
                for text in [&english, &chinese, &stories] {
                    check_split(&tokenizer, text);
                }
            }
        }
    }
}
