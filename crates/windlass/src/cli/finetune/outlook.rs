//! What a run will train, need and take, before it starts.

use super::{Args, Ranks, Settings};
use crate::cli::drive::{bytes, machine_memory};
use anyhow::Result;
use windlass::comm::Group;
use windlass::infer::LoadedModel;
use windlass::model::{Adapter, DecoderConfig, Model, Tokens, decoder};
use windlass::progress::say;
use windlass::store::{Deal, Home, Store};
use windlass::tensor::kernels::memory::Usage;
use windlass::tensor::{Category, Cpu};
use windlass::train::preference::Preference;
use windlass::train::tune::Examples;
use windlass::train::{Likeness, Plan, pace, plan_batch};

/// What a run will need.
pub struct Outlook {
    /// What one rank needs.
    pub plan: Plan,
    /// What the ranks of a process share.
    shared: Usage,
    /// For measuring: declared again, since the plan has used it up.
    model: Model<Tokens>,
    config: DecoderConfig,
    like: Likeness,
}

/// Trainable parameters, in PEFT's words.
pub fn parameters(model: &LoadedModel) -> String {
    let params = || model.model.units().iter().flat_map(|unit| &unit.params);
    let trained: usize = params().filter(|p| p.trained).map(|p| p.shape.len()).sum();
    let saved = |adapter: &Adapter| -> usize {
        let whole = adapter
            .tensors
            .iter()
            .filter(|file| !file.name.contains(".lora_"));
        whole.map(|file| file.shape.len()).sum()
    };
    // PEFT counts a module that is saved whole twice: as it was, and its copy.
    let all = model.model.num_params() + model.adapter.as_ref().map_or(0, saved);
    format!(
        "trainable params: {} || all params: {} || trainable%: {:.4}",
        grouped(trained),
        grouped(all),
        100.0 * trained as f64 / all as f64
    )
}

fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).expect("digits"))
        .collect();
    groups.join(",")
}

/// What a rank needs, of a model that was opened on a machine that computes nothing.
pub fn plan(
    opened: LoadedModel,
    settings: &Settings,
    train: &Examples,
    ranks: &Ranks,
) -> Result<Outlook> {
    let LoadedModel {
        config,
        model,
        store,
        dtype,
        adapter,
        ..
    } = opened;
    let map = match &adapter {
        Some(adapter) => adapter.tensors.clone(),
        None => config.naming.file_tensors(&model),
    };
    let mut again = decoder(&config);
    if let Some(adapter) = &adapter {
        again.adapt(config.naming, &adapter.config)?;
    }
    let memory = store.cpu().memory.clone();
    let weights = store.into_weights();
    // What is trained is each rank's own where they are threads of one process.
    let several = matches!(ranks, Ranks::Threads(ranks, _) if *ranks > 1);
    let others = several.then(|| weights.clone());
    let group = match ranks.count() {
        1 => Group::solo(),
        count => Group::dry(0, count),
    };
    let like = Likeness::of(&weights);
    let cpu = Cpu::dry();
    let home = Home::on(group, settings.placement);
    let store = Store::of(&cpu, home, model.units(), &Deal::new(weights, 1))?;
    drop(others);
    memory.trim();
    let shared = memory.now();
    let (shape, batch) = (settings.shape, train.largest(settings.shape.micro_batch));
    let plan = plan_batch(
        (model, store, map),
        &config,
        dtype,
        settings.engine,
        (shape, batch),
    );
    Ok(Outlook {
        plan,
        shared,
        model: again,
        config,
        like,
    })
}

/// Tokens of the sequence that the time is measured on, at most.
const MEASURED: usize = 256;

/// A run, as far as its memory and time depend on it.
pub struct Course<'a> {
    pub settings: &'a Settings,
    pub train: &'a Examples,
    pub preference: Option<Preference>,
    pub steps: u64,
    pub ranks: &'a Ranks,
}

impl Outlook {
    /// Says what the run needs, and how long it takes.
    pub fn tell(&self, args: &Args, course: &Course<'_>) -> Result<()> {
        let ranks = course.ranks;
        let (own, shared) = (self.plan.memory, self.shared);
        let apart = matches!(ranks, Ranks::Threads(ranks, _) if *ranks > 1);
        let mut each = own;
        if !apart {
            each.reserved += shared.reserved;
            let parts = each.by_category.iter_mut().zip(shared.by_category);
            parts.for_each(|(sum, more)| *sum += more);
        }
        let parts = Category::ALL.iter();
        let parts = parts.map(|c| format!("{} {}", c.name(), bytes(each.of(*c))));
        let parts = parts.collect::<Vec<_>>().join(", ");
        let of = match ranks.count() {
            1 => String::new(),
            count => format!(" for each of {count} ranks"),
        };
        let more = match apart && shared.reserved > 0 {
            true => format!(
                ", and {} of weights that they share",
                bytes(shared.reserved)
            ),
            false => String::new(),
        };
        say(&format!(
            "memory: {}{of} ({parts}){more}",
            bytes(each.reserved)
        ));
        if ranks.count() > 1 {
            let sent = bytes(self.plan.sent_per_step);
            say(&format!(
                "communication: {sent} sent by each rank in a step"
            ));
        }
        say(&format!(
            "steps: {}, of at most {} tokens",
            course.steps, self.plan.tokens_per_step
        ));
        self.tell_time(args, course)?;
        let all = ranks.here() * each.reserved + if apart { shared.reserved } else { 0 };
        if let Some(available) = machine_memory().filter(|&room| room < all) {
            say(&format!(
                "note: only {} are available: --checkpoint-activations, a smaller --batch with --accumulate, a shorter --max-length \
                 or --method qlora need less",
                bytes(available)
            ));
        }
        Ok(())
    }

    /// Says how long the run takes, from a layer of each kind.
    fn tell_time(&self, args: &Args, course: &Course<'_>) -> Result<()> {
        let (settings, ranks) = (course.settings, course.ranks);
        let cpu = args.machine.cpu()?;
        let batch = course.train.sample(MEASURED);
        let took = pace(
            &cpu,
            &self.model,
            &self.like,
            (&self.config, settings.dtype),
            &batch,
            settings.engine.activation_checkpointing,
        );
        // What comes before the pass that gives the loss, where answers are compared.
        let before = course.preference.map_or(0, |method| method.passes()) as f64;
        let seconds = (1.0 + before) * took.forward + took.backward;
        let machines = (ranks.count() / ranks.here()).max(1) as f64;
        let speed = machines * batch.ids.len() as f64 / seconds;
        let shape = settings.shape;
        let sequences = shape.micro_batch * shape.gradient_accumulation_steps * ranks.count();
        let tokens = course.train.mean() * sequences as f64 * course.steps as f64;
        say(&format!(
            "time: about {}, {speed:.0} tokens/s, measured on a layer of each kind; without evaluations",
            duration(tokens / speed)
        ));
        Ok(())
    }
}

/// Seconds in words.
fn duration(seconds: f64) -> String {
    let whole = seconds.ceil() as u64;
    match whole {
        0..120 => format!("{whole} s"),
        120..7200 => format!("{} min", whole.div_ceil(60)),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}
