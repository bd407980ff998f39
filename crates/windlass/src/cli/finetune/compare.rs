//! Flags about answers that are compared or rated.

use super::{Args as All, Method};
use crate::cli::{failure, usage};
use anyhow::Result;
use windlass::infer::LoadedModel;
use windlass::train::preference::Preference;
use windlass::train::tune::Form;

/// How answers are compared.
#[derive(clap::Args)]
pub struct Args {
    /// How answers are compared: dpo or orpo for chosen and rejected ones, kto for rated ones [default: dpo, or kto]
    #[arg(long, value_enum)]
    preference: Option<Kind>,
    /// How much the model is held to what it was (dpo, kto), or the comparison counts (orpo) [default: 0.1]
    #[arg(long)]
    beta: Option<f64>,
    /// dpo: part of the pairs that is taken to be the wrong way round
    #[arg(long, value_name = "PART")]
    label_smoothing: Option<f64>,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Dpo,
    Orpo,
    Kto,
}

/// How the answers of data are compared; `None` where there are none to compare.
pub fn method(all: &All, form: Form, model: &LoadedModel) -> Result<Option<Preference>> {
    let args = &all.compare;
    let kind = match (args.preference, form.is_preference(), form.is_unpaired()) {
        (None, false, false) => {
            if args.beta.is_some() || args.label_smoothing.is_some() {
                let message =
                    format!("--beta or --label-smoothing, and the data are of the form {form}");
                return Err(usage(message, "they are about answers that are compared"));
            }
            return Ok(None);
        }
        (None | Some(Kind::Dpo), true, _) => Kind::Dpo,
        (Some(Kind::Orpo), true, _) => Kind::Orpo,
        (None | Some(Kind::Kto), _, true) => Kind::Kto,
        (Some(kind), ..) => {
            let message =
                format!("--preference {kind:?} and data of the form {form}").to_lowercase();
            let hint = "dpo and orpo need chosen and rejected answers, kto answers with a label";
            return Err(usage(message, hint));
        }
    };
    let beta = args.beta.unwrap_or(0.1);
    let label_smoothing = args.label_smoothing.unwrap_or(0.0);
    if !(beta > 0.0 && beta.is_finite()) {
        return Err(usage(format!("--beta {beta}"), "it must be positive"));
    }
    if !(0.0..0.5).contains(&label_smoothing) || label_smoothing > 0.0 && kind != Kind::Dpo {
        let message = format!("--label-smoothing {label_smoothing}");
        return Err(usage(message, "it is of dpo, at least 0 and below 0.5"));
    }
    let preference = match kind {
        Kind::Dpo => Preference::Dpo {
            beta,
            label_smoothing,
        },
        Kind::Orpo => Preference::Orpo { beta },
        Kind::Kto => Preference::Kto {
            beta,
            desirable_weight: 1.0,
            undesirable_weight: 1.0,
        },
    };
    let whole = model.adapter.as_ref();
    let whole = whole.is_some_and(|adapter| !adapter.config.modules_to_save.is_empty());
    if preference.has_reference() && (all.method == Method::Full || whole) {
        let message = "the reference is the model without its adapter, and weights of the model itself are trained";
        let hint = "use --preference orpo, which needs no reference, or train adapters alone";
        return Err(failure(message, hint));
    }
    Ok(Some(preference))
}
