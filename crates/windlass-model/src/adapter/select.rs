//! Which modules an adapter's settings choose, by PEFT's rules.

use super::config::{AdapterConfig, Targets};
use super::{is_matrix, module};
use crate::config::{ModelError, nearest};
use crate::names::Naming;
use regex::Regex;
use std::collections::BTreeSet;
use windlass_tensor::{FileTensor, Layout};

/// The tables of embeddings among them.
const TABLES: [&str; 3] = ["model.embed_tokens", "transformer.wte", "gpt_neox.embed_in"];

/// The modules that are neither projections of a block nor norms: tables and heads.
const ENDS: [&str; 7] = [
    "model.embed_tokens",
    "transformer.wte",
    "transformer.wpe",
    "gpt_neox.embed_in",
    "model.embed_positions",
    "lm_head",
    "embed_out",
];

/// The modules that settings choose among those of a model.
pub(super) struct Selection<'a> {
    pub(super) config: &'a AdapterConfig,
    adapted: BTreeSet<String>,
    saved: BTreeSet<String>,
    /// What files call the head, where it is a table that is saved.
    tied_head: Option<&'static str>,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
}

impl<'a> Selection<'a> {
    pub(super) fn new(
        config: &'a AdapterConfig,
        naming: Naming,
        files: &[FileTensor],
    ) -> Result<Self, ModelError> {
        let modules: BTreeSet<&str> = files.iter().map(|f| module(&f.name)).collect();
        let matrices = files.iter().filter(|f| is_matrix(f));
        let matrices: BTreeSet<&str> = matrices.map(|f| module(&f.name)).collect();
        let transposed = files.iter().any(|f| f.layout == Layout::Transposed);
        if config.fan_in_fan_out && !transposed {
            return Err(config.error(
                "fan_in_fan_out",
                "is true, and this model's files hold no transposed matrices",
                "set it to false: only GPT-2 stores its matrices that way",
            ));
        }
        let (saved, tied_head) = saved(config, naming, &modules)?;
        let mut adapted = BTreeSet::new();
        for &name in &matrices {
            if !saved.contains(name) && config.chooses(naming, name)? {
                if ENDS.contains(&name) {
                    return Err(config.error(
                        "target_modules",
                        format!("names {name}, and tables and heads have no adapters here"),
                        "train it whole instead: put it in modules_to_save",
                    ));
                }
                adapted.insert(name.to_owned());
            }
        }
        unmatched(config, &matrices, &adapted)?;
        Ok(Selection {
            config,
            adapted,
            saved,
            tied_head,
            ranks: config.patterns("rank_pattern", &config.rank_pattern)?,
            alphas: config.patterns("alpha_pattern", &config.alpha_pattern)?,
        })
    }

    pub(super) fn adapts(&self, module: &str) -> bool {
        self.adapted.contains(module)
    }

    pub(super) fn saves(&self, module: &str) -> bool {
        self.saved.contains(module)
    }

    /// Whether a table that is the head too is saved.
    pub(super) fn ties(&self) -> bool {
        self.tied_head.is_some()
    }

    /// The other name of a table that is saved, where it is the head too: PEFT writes it under both.
    pub(super) fn tied_head(&self, module: &str) -> Option<&'static str> {
        self.tied_head.filter(|_| TABLES.contains(&module))
    }

    /// The rank of a module's adapter, and what its product is multiplied with.
    pub(super) fn rank_and_scale(&self, module: &str) -> (usize, f64) {
        let rank = self.ranks.iter().find(|(key, _)| key.is_match(module));
        let alpha = self.alphas.iter().find(|(key, _)| key.is_match(module));
        let r = rank.map_or(self.config.r, |(_, r)| *r);
        let alpha = alpha.map_or(self.config.lora_alpha, |(_, alpha)| *alpha);
        let scale = match self.config.use_rslora {
            true => alpha / (r as f64).sqrt(),
            false => alpha / r as f64,
        };
        (r, scale)
    }
}

/// The modules of `modules_to_save`, and the name of the head where a table that is head too is among them.
fn saved(
    config: &AdapterConfig,
    naming: Naming,
    modules: &BTreeSet<&str>,
) -> Result<(BTreeSet<String>, Option<&'static str>), ModelError> {
    let head = naming.head();
    let table = TABLES.iter().find(|table| modules.contains(*table));
    let tied = table.filter(|_| !modules.contains(head));
    let mut saved = BTreeSet::new();
    for wanted in &config.modules_to_save {
        // Any end of a name counts, as in PEFT: "norm" is every norm.
        let named = modules
            .iter()
            .filter(|name| name.ends_with(wanted.as_str()));
        let mut named: Vec<String> = named.map(|name| (*name).to_owned()).collect();
        if let Some(table) = tied.filter(|_| head.ends_with(wanted.as_str())) {
            named.push((*table).to_owned());
        }
        if named.is_empty() {
            let key = "modules_to_save";
            return Err(config.error(
                key,
                format!("\"{wanted}\" matches no module of the model"),
                exists(wanted, modules.iter().copied()),
            ));
        }
        saved.extend(named);
    }
    let Some(table) = tied.filter(|table| saved.contains(**table)) else {
        return Ok((saved, None));
    };
    if !config.ensure_weight_tying {
        return Err(config.error(
            "modules_to_save",
            format!("names {table}, which is table and head in one in this model"),
            "without \"ensure_weight_tying\": true, PEFT makes two different copies of it, and models here have one: train \
             the adapter with it",
        ));
    }
    Ok((saved, Some(head)))
}

/// Refuses a choice that chooses nothing, or a name in it that does.
fn unmatched(
    config: &AdapterConfig,
    matrices: &BTreeSet<&str>,
    adapted: &BTreeSet<String>,
) -> Result<(), ModelError> {
    let candidates = || matrices.iter().copied().filter(|name| !ENDS.contains(name));
    if let Targets::Names(names) = &config.target_modules
        && config.layers_to_transform.is_none()
        && config.exclude_modules.is_none()
    {
        let matches = |wanted: &&String| adapted.iter().any(|name| ends_with(name, wanted));
        if let Some(wanted) = names.iter().find(|wanted| !matches(wanted)) {
            return Err(config.error(
                "target_modules",
                format!("\"{wanted}\" matches no module of the model"),
                exists(wanted, candidates()),
            ));
        }
    }
    if adapted.is_empty() && config.modules_to_save.is_empty() {
        return Err(config.error(
            "target_modules",
            "matches no module of the model",
            exists("", candidates()),
        ));
    }
    Ok(())
}

/// The last words of the names that exist, and the one nearest to what was asked for.
fn exists<'n>(wanted: &str, names: impl Iterator<Item = &'n str>) -> String {
    let last = |name: &'n str| name.rsplit_once('.').map_or(name, |(_, last)| last);
    let kinds: BTreeSet<&str> = names.map(last).collect();
    let known = kinds.iter().copied().collect::<Vec<_>>().join(", ");
    match nearest(wanted, kinds.iter().copied()).filter(|_| !wanted.is_empty()) {
        Some(near) => format!("nearest: {near}; the model has {known}"),
        None => format!("the model has {known}"),
    }
}

/// Whether a module has a name, or ends with it.
fn ends_with(module: &str, name: &str) -> bool {
    let rest = module.strip_suffix(name);
    rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

impl AdapterConfig {
    /// The rank of a module's factors, and what their product is multiplied with.
    ///
    /// # Errors
    /// A key of a pattern that is none.
    pub fn rank_and_scale(&self, module: &str) -> Result<(usize, f64), ModelError> {
        let selection = Selection {
            config: self,
            adapted: BTreeSet::new(),
            saved: BTreeSet::new(),
            tied_head: None,
            ranks: self.patterns("rank_pattern", &self.rank_pattern)?,
            alphas: self.patterns("alpha_pattern", &self.alpha_pattern)?,
        };
        Ok(selection.rank_and_scale(module))
    }

    /// Whether a projection gets an adapter, of those that are not saved whole.
    fn chooses(&self, naming: Naming, name: &str) -> Result<bool, ModelError> {
        let excluded = match &self.exclude_modules {
            None => false,
            Some(Targets::Pattern(pattern)) => {
                self.whole_match("exclude_modules", pattern)?.is_match(name)
            }
            Some(Targets::Names(names)) => names.iter().any(|wanted| ends_with(name, wanted)),
            Some(Targets::AllLinear | Targets::Usual) => true,
        };
        if excluded {
            return Ok(false);
        }
        let usual;
        let names = match &self.target_modules {
            Targets::AllLinear => {
                let router = name.ends_with(".mlp.gate") || name.ends_with("block_sparse_moe.gate");
                return Ok(!router && !ENDS.contains(&name));
            }
            Targets::Pattern(pattern) => {
                return Ok(self.whole_match("target_modules", pattern)?.is_match(name));
            }
            Targets::Names(names) => names,
            Targets::Usual => {
                let words: &[&str] = match naming {
                    Naming::Llama | Naming::Mixtral => &["q_proj", "v_proj"],
                    Naming::Phi3 => &["qkv_proj"],
                    Naming::Gpt2 => &["c_attn"],
                    Naming::NeoX { .. } => &["query_key_value"],
                };
                usual = words.iter().map(|&word| word.to_owned()).collect();
                &usual
            }
        };
        let named = names.iter().any(|wanted| ends_with(name, wanted));
        let layers = self.layers_to_transform.as_deref().unwrap_or_default();
        if !named || layers.is_empty() {
            return Ok(named);
        }
        let patterns = match self.layers_pattern.as_slice() {
            [] => vec![r"^.*?\.[^.]*\.(\d+)\.".to_owned()],
            some => some
                .iter()
                .map(|word| format!(r"^(?:|.*?\.)(?:{word})\.(\d+)\."))
                .collect(),
        };
        for pattern in patterns {
            let pattern = self.regex("layers_pattern", &pattern)?;
            if let Some(found) = pattern.captures(name) {
                let index = found[1].parse::<usize>();
                return Ok(index.is_ok_and(|index| layers.contains(&index)));
            }
        }
        Ok(false)
    }

    /// Patterns as PEFT applies them to the end of a module's name.
    fn patterns<T: Copy>(
        &self,
        key: &str,
        patterns: &[(String, T)],
    ) -> Result<Vec<(Regex, T)>, ModelError> {
        let compiled = patterns.iter().map(|(pattern, value)| {
            let regex = self.regex(key, &format!(r"^(?:.*\.)?(?:{pattern})$"))?;
            Ok((regex, *value))
        });
        compiled.collect()
    }

    fn whole_match(&self, key: &str, pattern: &str) -> Result<Regex, ModelError> {
        self.regex(key, &format!("^(?:{pattern})$"))
    }

    fn regex(&self, key: &str, pattern: &str) -> Result<Regex, ModelError> {
        Regex::new(pattern).map_err(|error| {
            let hint = "look-around and back references are not understood here";
            self.error(key, format!("is no pattern: {error}"), hint)
        })
    }
}
