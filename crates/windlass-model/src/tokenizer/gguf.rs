//! Tokenizers built from the vocabulary of a GGUF file.
//!
//! Byte-level BPE, WordPiece and Unigram become pipelines of the `tokenizers` crate; SentencePiece BPE is encoded by
//! code of our own, because a list of merges does not say everything that scores say.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use serde_json::json;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::decoders::wordpiece::WordPiece as WordPieceDecoder;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::{BpeBuilder, Vocab};
use tokenizers::models::unigram::Unigram;
use tokenizers::models::wordpiece::WordPieceBuilder;
use tokenizers::normalizers::bert::BertNormalizer;
use tokenizers::normalizers::precompiled::Precompiled;
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::replace::{Replace, ReplacePattern};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::{NormalizerWrapper, Sequence as Normalizers, Strip as StripSpaces};
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, DecoderWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer as Pipeline,
};

use super::spm::{SPACE, Spm};
use super::vocabulary::invalid;
use super::{
    GgufVocabulary, Origin, TokenType, Tokenizer, TokenizerError, charsmap, failed, pieces, pre,
};

/// Tokens that end a message or a text wherever they are a vocabulary's control tokens.
const KNOWN_ENDS: [&str; 13] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "<EOT>",
    "[EOT]",
    "<end_of_utterance>",
];

/// Words longer than this are unknown to a WordPiece tokenizer, as published ones have it.
const LONGEST_WORD: usize = 100;

/// What encodes and decodes, before it becomes a [`Tokenizer`].
struct Parts {
    pipeline: Pipeline,
    spm: Option<Spm>,
    add_bos: bool,
    add_eos: bool,
}

impl Tokenizer {
    /// Builds the tokenizer of a GGUF file.
    ///
    /// The tokens that end a text are `eos`, `eot` and `eom`, then control tokens that do so by convention
    /// (`<|im_end|>`, `<|eot_id|>`, …). What a file leaves out is as in llama.cpp: `llama` begins with `<s>` and a
    /// space, `gpt2` with what its `pre` says.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownAlgorithm`] and [`TokenizerError::UnknownPre`] with what is known,
    /// [`TokenizerError::Vocabulary`] for arrays that are missing, too short or contradictory.
    pub fn from_gguf(vocabulary: &GgufVocabulary) -> Result<Self, TokenizerError> {
        let mut vocabulary = vocabulary.clone();
        let (ids, mut notes) = vocabulary.check()?;
        let mut parts = match vocabulary.model.as_str() {
            "llama" => sentencepiece(&mut vocabulary, &ids)?,
            "gpt2" => byte_level(&vocabulary, &ids, &mut notes)?,
            "bert" => word_piece(&mut vocabulary, &ids)?,
            "t5" => unigram(&mut vocabulary, &ids)?,
            other => {
                return Err(TokenizerError::UnknownAlgorithm {
                    model: other.to_owned(),
                });
            }
        };
        add_tokens(&vocabulary, &mut parts.pipeline)?;
        let around = around(&vocabulary, &parts)?;
        let eos = ends(&vocabulary, &ids);
        let splittable = vocabulary.model == "gpt2" && is_splittable(&vocabulary, &parts.pipeline);
        Ok(Tokenizer {
            vocab_size: vocabulary.tokens.len(),
            inner: parts.pipeline,
            unmarked: OnceLock::new(),
            bos: vocabulary.bos,
            pad: vocabulary.padding,
            eos,
            splittable,
            files: OnceLock::new(),
            origin: Some(Arc::new(Origin {
                vocabulary,
                spm: parts.spm,
                around,
                notes,
            })),
        })
    }
}

fn is_splittable(vocabulary: &GgufVocabulary, pipeline: &Pipeline) -> bool {
    let words = pipeline.get_pre_tokenizer().map(serde_json::to_value);
    let Some(Ok(words)) = words else { return false };
    let added = (0..).zip(&vocabulary.tokens);
    let added = added.filter(|(id, _)| vocabulary.token_type(*id).is_found_whole());
    let added: Vec<_> = added.map(|(_, text)| json!({ "content": text })).collect();
    pieces::is_splittable(&json!({ "pre_tokenizer": words, "added_tokens": added }))
}

/// The tokens before and after a text.
fn around(
    vocabulary: &GgufVocabulary,
    parts: &Parts,
) -> Result<(Vec<u32>, Vec<u32>), TokenizerError> {
    let need = |wanted: bool, asked: Option<bool>, id: Option<u32>, name: &str| match (wanted, id) {
        (true, None) if asked == Some(true) => Err(invalid(format!(
            "tokenizer.ggml.add_{name}_token is true, but there is no {name}_token_id"
        ))),
        (true, id) => Ok(id.into_iter().collect()),
        (false, _) => Ok(Vec::new()),
    };
    let before = need(parts.add_bos, vocabulary.add_bos, vocabulary.bos, "bos")?;
    let end = match vocabulary.model.as_str() {
        "bert" => vocabulary.separator,
        _ => vocabulary.eos,
    };
    let after = need(parts.add_eos, vocabulary.add_eos, end, "eos")?;
    Ok((before, after))
}

/// The ids that end a text, those that the file names first.
fn ends(vocabulary: &GgufVocabulary, ids: &HashMap<String, u32>) -> Vec<u32> {
    let by_name = KNOWN_ENDS.iter().filter_map(|end| ids.get(*end).copied());
    let by_name = by_name.filter(|&id| vocabulary.token_type(id) == TokenType::Control);
    // Where answers end with <|return|> or <|call|>, <|end|> only ends one of their parts.
    let has = |name| ids.contains_key(name);
    let parted = has("<|return|>") && has("<|call|>");
    let by_name = by_name.filter(|&id| !(parted && vocabulary.tokens[id as usize] == "<|end|>"));
    let named = [vocabulary.eos, vocabulary.eot, vocabulary.eom];
    let mut ends = Vec::new();
    for id in named.into_iter().flatten().chain(by_name) {
        if !ends.contains(&id) {
            ends.push(id);
        }
    }
    ends
}

/// Makes the pipeline find special and user-defined tokens in a text, and leave out special ones where wanted.
fn add_tokens(vocabulary: &GgufVocabulary, pipeline: &mut Pipeline) -> Result<(), TokenizerError> {
    let tokens = (0..).zip(&vocabulary.tokens).filter_map(|(id, token)| {
        let kind = vocabulary.token_type(id);
        let added = AddedToken::from(token.as_str(), kind.is_hidden()).normalized(false);
        kind.is_found_whole().then_some(added)
    });
    let added = pipeline.add_tokens(tokens.collect::<Vec<_>>());
    added.map_err(|error| failed("be set up", &*error))?;
    Ok(())
}

/// Byte-level BPE: words by the patterns of `pre`, merges by rank.
fn byte_level(
    vocabulary: &GgufVocabulary,
    ids: &HashMap<String, u32>,
    notes: &mut Vec<String>,
) -> Result<Parts, TokenizerError> {
    if vocabulary.merges.is_empty() {
        return Err(invalid("tokenizer.ggml.merges is missing"));
    }
    let name = vocabulary.pre.as_deref().unwrap_or_else(|| {
        notes.push("tokenizer.ggml.pre is missing: words are cut as \"default\" has it".into());
        "default"
    });
    let words = pre::find(name).ok_or_else(|| TokenizerError::UnknownPre {
        pre: name.to_owned(),
        known: pre::known(),
    })?;
    let mut merges = Vec::with_capacity(vocabulary.merges.len());
    let mut seen = std::collections::HashSet::with_capacity(vocabulary.merges.len());
    for (index, merge) in vocabulary.merges.iter().enumerate() {
        let refuse = |what| {
            let key = format!("tokenizer.ggml.merges[{index}], {merge:?},");
            invalid(format!("{key} {what}"))
        };
        // The first character may be a space itself.
        let first = merge.chars().next().map_or(0, char::len_utf8);
        let space = merge[first..].find(' ').map(|at| first + at);
        let (left, right) = match space {
            Some(at) => (&merge[..at], &merge[at + 1..]),
            None => return Err(refuse("is no pair")),
        };
        let known = |token: &str| ids.contains_key(token);
        if !(known(left) && known(right) && known(&[left, right].concat())) {
            return Err(refuse("joins or makes what is no token"));
        }
        if seen.insert((left, right)) {
            merges.push((left.to_owned(), right.to_owned()));
        }
    }
    let model = BpeBuilder::new()
        .vocab_and_merges(as_library_map(ids), merges)
        .ignore_merges(words.ignore_merges)
        .build()
        .map_err(|error| failed("be built", &*error))?;
    let mut pipeline = Pipeline::new(model);
    let bytes = ByteLevel::new(false, true, false);
    let mut steps = Vec::new();
    for pattern in words.patterns {
        steps.push(split(pattern)?);
    }
    steps.push(PreTokenizerWrapper::ByteLevel(bytes));
    normalize(&mut pipeline, words.composes.then_some(NFC))?;
    pipeline
        .with_pre_tokenizer(Some(Sequence::new(steps)))
        .with_decoder(Some(DecoderWrapper::ByteLevel(bytes)));
    Ok(Parts {
        pipeline,
        spm: None,
        add_bos: vocabulary.add_bos.unwrap_or(words.add_bos),
        add_eos: vocabulary.add_eos.unwrap_or(false),
    })
}

fn as_library_map(ids: &HashMap<String, u32>) -> Vocab {
    ids.iter().map(|(token, &id)| (token.clone(), id)).collect()
}

fn normalize<N: Into<NormalizerWrapper>>(
    pipeline: &mut Pipeline,
    normalizer: Option<N>,
) -> Result<(), TokenizerError> {
    let set = pipeline.with_normalizer(normalizer).map(|_| ());
    set.map_err(|error| failed("be set up", &*error))
}

fn split(pattern: &str) -> Result<PreTokenizerWrapper, TokenizerError> {
    let pattern = SplitPattern::Regex(pattern.to_owned());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
    let split = split.map_err(|error| failed("be built", &*error))?;
    Ok(PreTokenizerWrapper::Split(split))
}

/// SentencePiece BPE. The pipeline decodes; its model has no merges, which only a saved copy needs.
fn sentencepiece(
    vocabulary: &mut GgufVocabulary,
    ids: &HashMap<String, u32>,
) -> Result<Parts, TokenizerError> {
    let within = |id: u32| ((id as usize) < ids.len()).then_some(id);
    vocabulary.bos = vocabulary.bos.or(within(1));
    vocabulary.eos = vocabulary.eos.or(within(2));
    let spm = Spm::new(vocabulary, ids)?;
    let model = BpeBuilder::new()
        .vocab_and_merges(as_library_map(ids), Vec::new())
        .byte_fallback(true)
        .build()
        .map_err(|error| failed("be built", &*error))?;
    let mut pipeline = Pipeline::new(model);
    let prefix = vocabulary.add_space_prefix.unwrap_or(true);
    pipeline.with_decoder(Some(decoder_with_spaces(prefix)?));
    Ok(Parts {
        pipeline,
        spm: Some(spm),
        add_bos: vocabulary.add_bos.unwrap_or(true),
        add_eos: vocabulary.add_eos.unwrap_or(false),
    })
}

/// Spaces for their marks, bytes for byte tokens, and without the space that was put before the text.
fn decoder_with_spaces(prefix: bool) -> Result<DecoderWrapper, TokenizerError> {
    let mut steps = vec![
        DecoderWrapper::Replace(replace(ReplacePattern::String(SPACE.into()), " ")?),
        DecoderWrapper::ByteFallback(ByteFallback::new()),
        DecoderWrapper::Fuse(Fuse::new()),
    ];
    if prefix {
        steps.push(DecoderWrapper::Strip(Strip::new(' ', 1, 0)));
    }
    Ok(DecoderWrapper::Sequence(Decoders::new(steps)))
}

fn replace(pattern: ReplacePattern, content: &str) -> Result<Replace, TokenizerError> {
    Replace::new(pattern, content).map_err(|error| failed("be built", &*error))
}

/// WordPiece. In GGUF a token that begins a word has a mark before it, and others have none; the library has it the
/// other way round.
fn word_piece(
    vocabulary: &mut GgufVocabulary,
    ids: &HashMap<String, u32>,
) -> Result<Parts, TokenizerError> {
    let within = |id: u32| ((id as usize) < ids.len()).then_some(id);
    vocabulary.bos = vocabulary.bos.or(within(101));
    vocabulary.unknown = vocabulary.unknown.or(within(100));
    vocabulary.separator = vocabulary.separator.or(within(102));
    let Some(unknown) = vocabulary.unknown else {
        return Err(invalid("tokenizer.ggml.unknown_token_id is missing"));
    };
    let spelled = |id: u32, token: &String| match token.strip_prefix(SPACE) {
        _ if vocabulary.token_type(id) != TokenType::Normal => token.clone(),
        _ if id == unknown => token.clone(),
        Some(begin) => begin.to_owned(),
        None => format!("##{token}"),
    };
    let vocab = (0..).zip(&vocabulary.tokens);
    let model = WordPieceBuilder::new()
        .vocab(
            vocab
                .map(|(id, token)| (spelled(id, token), id))
                .collect::<Vocab>(),
        )
        .unk_token(vocabulary.tokens[unknown as usize].clone())
        .continuing_subword_prefix("##".into())
        .max_input_chars_per_word(LONGEST_WORD)
        .build()
        .map_err(|error| failed("be built", &*error))?;
    let lowercase = vocabulary.lowercase.unwrap_or(true);
    let accents = vocabulary.strip_accents.unwrap_or(lowercase);
    let mut pipeline = Pipeline::new(ModelWrapper::WordPiece(model));
    let letters = BertNormalizer::new(true, true, Some(accents), lowercase);
    normalize(&mut pipeline, Some(letters))?;
    pipeline
        .with_pre_tokenizer(Some(BertPreTokenizer))
        .with_decoder(Some(WordPieceDecoder::new("##".into(), true)));
    Ok(Parts {
        pipeline,
        spm: None,
        add_bos: vocabulary.add_bos.unwrap_or(true),
        add_eos: vocabulary.add_eos.unwrap_or(true),
    })
}

/// Unigram: the likeliest sequence of pieces.
fn unigram(
    vocabulary: &mut GgufVocabulary,
    ids: &HashMap<String, u32>,
) -> Result<Parts, TokenizerError> {
    if vocabulary.scores.is_empty() {
        return Err(invalid("tokenizer.ggml.scores is missing"));
    }
    let within = |id: u32| ((id as usize) < ids.len()).then_some(id);
    vocabulary.eos = vocabulary.eos.or(within(1));
    vocabulary.unknown = vocabulary.unknown.or(within(2));
    let Some(unknown) = vocabulary.unknown else {
        return Err(invalid("tokenizer.ggml.unknown_token_id is missing"));
    };
    if let Some(id) = vocabulary
        .scores
        .iter()
        .position(|score| !score.is_finite())
    {
        return Err(invalid(format!("tokenizer.ggml.scores[{id}] is infinite")));
    }
    let mut pieces = Vec::with_capacity(vocabulary.tokens.len());
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        let score = match vocabulary.token_type(id as u32) {
            TokenType::UserDefined => 0.0,
            _ => vocabulary.scores[id],
        };
        pieces.push((token.clone(), f64::from(score)));
    }
    let bytes = vocabulary.token_types.contains(&TokenType::Byte);
    let model = Unigram::from(pieces, Some(unknown as usize), bytes)
        .map_err(|error| failed("be built", &*error))?;
    let mut steps = Vec::new();
    if !vocabulary.precompiled_charsmap.is_empty() {
        charsmap::check(&vocabulary.precompiled_charsmap)?;
        let table = Precompiled::from(&vocabulary.precompiled_charsmap);
        let table = table.map_err(|error| failed("be built", &error))?;
        steps.push(NormalizerWrapper::Precompiled(table));
    }
    if vocabulary.remove_extra_whitespaces.unwrap_or(false) {
        steps.push(NormalizerWrapper::StripNormalizer(StripSpaces::new(
            true, true,
        )));
        let several = ReplacePattern::Regex(" {2,}".into());
        steps.push(NormalizerWrapper::Replace(replace(several, " ")?));
    }
    let prefix = vocabulary.add_space_prefix.unwrap_or(true);
    if prefix {
        steps.push(NormalizerWrapper::Prepend(Prepend::new(SPACE.into())));
    }
    // Words are cut at spaces unless tokens span them.
    let spans = |token: &String| token.chars().skip(1).any(|c| c == '\u{2581}');
    let cut = !vocabulary.tokens.iter().any(spans);
    let spaces = Metaspace::new('\u{2581}', PrependScheme::Never, cut);
    let mut pipeline = Pipeline::new(ModelWrapper::Unigram(model));
    normalize(
        &mut pipeline,
        (!steps.is_empty()).then(|| Normalizers::new(steps)),
    )?;
    pipeline
        .with_pre_tokenizer(Some(PreTokenizerWrapper::Metaspace(spaces)))
        .with_decoder(Some(decoder_with_spaces(prefix)?));
    Ok(Parts {
        pipeline,
        spm: None,
        add_bos: vocabulary.add_bos.unwrap_or(false),
        add_eos: vocabulary.add_eos.unwrap_or(true),
    })
}
