//! Measuring on what is held out.

use super::Trainer;
use crate::data::Batch;
use crate::error::Result;
use crate::evaluate::{idle, run};
use windlass_model::{Goal, Objective, Tokens};

impl Trainer {
    /// Mean loss of the held-out tokens, in nats; where answers are compared, the mean loss of a comparison.
    ///
    /// # Errors
    /// When there are no held-out tokens.
    pub fn evaluate(&self) -> Result<f64> {
        let batches = self.feed.evaluation(self.options.shape.micro_batch)?;
        let limit = self.options.eval_sequences.unwrap_or(u64::MAX);
        let (rank, ranks) = (self.group().rank(), self.group().size());
        let (model, store) = (self.engine.model(), self.engine.store());
        let (mut sum, mut scored, mut sequences) = (0.0, 0.0, 0);
        let mut batches = batches
            .take_while(|batch| {
                sequences += batch.sequences as u64;
                sequences - (batch.sequences as u64) < limit
            })
            .peekable();
        // Each rank computes every `ranks`-th batch; in the last round some have none, and gather all the same. Rounds are
        // added up in the order of the batches: the sum is that of one rank.
        while batches.peek().is_some() {
            let round: Vec<Batch> = batches.by_ref().take(ranks).collect();
            let own = match round.into_iter().nth(rank) {
                Some(batch) => self.measure(batch)?,
                None => {
                    let passes = self.preference.map_or(0, |method| method.passes());
                    (0..=passes).try_for_each(|_| idle(model, store))?;
                    [0.0, 0.0]
                }
            };
            for batch in self.all("evaluation", &own)?.chunks(2) {
                (sum, scored) = (sum + batch[0], scored + batch[1]);
            }
        }
        Ok(sum / scored.max(1.0))
    }

    /// The sum of a batch's losses, and what it counts.
    fn measure(&self, batch: Batch) -> Result<[f64; 2]> {
        let (model, store) = (self.engine.model(), self.engine.store());
        if let Some(method) = self.preference {
            let weight = self.weight(&batch);
            let (tokens, comparison) = self.compared(batch, method, weight)?;
            let goal = Goal::TokenLosses {
                targets: match &tokens.goal {
                    Goal::Objective { targets, .. } => targets.clone(),
                    _ => unreachable!("answers are compared by an objective"),
                },
            };
            let losses = run(model, store, &Tokens { goal, ..tokens })?.to_f64();
            return Ok([weight.0 * comparison.evaluate(&losses).0, weight.0]);
        }
        let scored = batch.scored() as f64;
        let goal = Goal::TokenLosses {
            targets: batch.targets.into(),
        };
        let tokens = Tokens::new(batch.ids, &batch.segments, goal, self.options.dtype);
        let losses = run(model, store, &tokens)?.to_f64();
        Ok([losses.iter().sum::<f64>(), scored])
    }
}
