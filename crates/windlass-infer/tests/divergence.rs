//! Perplexity by halves of windows and the divergence from saved logits, against plain sums over whole logits.

use std::path::{Path, PathBuf};
use windlass_infer::divergence::{divergence, perplexity_of_halves};
use windlass_infer::saved_logits::SavedLogits;
use windlass_infer::{InferError, LoadedModel};
use windlass_store::atomic::RealDisk;
use windlass_tensor::Cpu;

const WINDOW: usize = 48;

fn data() -> Option<PathBuf> {
    let data = std::env::var_os("WINDLASS_TEST_DATA").map(PathBuf::from);
    if data.is_none() {
        println!("WINDLASS_TEST_DATA is not set: nothing is compared");
    }
    data
}

/// Log-probabilities, and the token that follows, at each scored place.
fn scored(model: &LoadedModel, ids: &[u32]) -> Vec<(Vec<f64>, usize)> {
    let mut all = Vec::new();
    for window in ids.chunks_exact(WINDOW) {
        let mut window = window.to_vec();
        window[0] = 1;
        let logits = model.logits(&window).unwrap().to_f64();
        let rows: Vec<&[f64]> = logits.chunks(logits.len() / WINDOW).collect();
        for at in WINDOW / 2..WINDOW - 1 {
            let sum: f64 = rows[at].iter().map(|l| l.exp()).sum();
            let logs = rows[at].iter().map(|l| l - sum.ln()).collect();
            all.push((logs, window[at + 1] as usize));
        }
    }
    all
}

fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let values: Vec<f64> = values.into_iter().collect();
    values.iter().sum::<f64>() / values.len() as f64
}

#[track_caller]
fn near(got: f64, want: f64, tolerance: f64) {
    let error = (got - want).abs();
    assert!(
        error <= tolerance * want.abs().max(1e-3),
        "{got} against {want}"
    );
}

#[test]
fn measures_are_sums_over_the_logits() {
    let Some(data) = data() else { return };
    let cpu = Cpu::new(2);
    let file = data.join("models/stories260K/gguf-v3");
    let open = |name: &str| {
        LoadedModel::open(&cpu, &file.join(format!("stories260K-{name}.gguf")), None).unwrap()
    };
    let (model, small) = (open("F32"), open("Q4_0"));
    let text = std::fs::read_to_string(data.join("corpora/tinystories/val_decoded.txt")).unwrap();
    let mut ids = model
        .encode(&text[..text.floor_char_boundary(3000)])
        .unwrap();
    ids.truncate(7 * WINDOW + 20);

    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("logits");
    let plain = perplexity_of_halves(&model, &ids, WINDOW, None, &mut |_, _| {}).unwrap();
    let mut told = Vec::new();
    let save = Some((&RealDisk as _, path.as_path()));
    let tell = &mut |done, _| told.push(done);
    let saved = perplexity_of_halves(&model, &ids, WINDOW, save, tell).unwrap();
    assert_eq!(told.last(), Some(&(7 * WINDOW)));
    assert_eq!((saved.windows, saved.scored_tokens), (7, 7 * 23));
    near(saved.loss, plain.loss, 1e-6);
    let want = scored(&model, &ids);
    near(
        saved.loss,
        mean(want.iter().map(|(logs, next)| -logs[*next])),
        1e-6,
    );

    let reference = SavedLogits::open(&path).unwrap();
    assert_eq!(reference.ids(), ids[..7 * WINDOW]);
    let got = divergence(&small, &reference, &mut |_, _| {}).unwrap();
    let other = scored(&small, &ids);
    let kls = want.iter().zip(&other).map(|((p, _), (q, _))| {
        let kl = p.iter().zip(q).map(|(p, q)| p.exp() * (p - q));
        kl.sum::<f64>()
    });
    let mut kls: Vec<f64> = kls.collect();
    near(got.mean_kl, mean(kls.iter().copied()), 2e-3);
    let spread = mean(kls.iter().map(|kl| (kl - got.mean_kl).powi(2)));
    near(
        got.mean_kl_error,
        (spread / (kls.len() - 1) as f64).sqrt(),
        1e-2,
    );
    kls.sort_by(f64::total_cmp);
    near(got.median_kl, kls[kls.len() / 2], 1e-2);
    near(got.max_kl, kls[kls.len() - 1], 1e-2);
    assert!(got.kl_99 > got.median_kl && got.kl_99 < got.max_kl);
    let changes = want.iter().zip(&other);
    let changes: Vec<f64> = changes
        .map(|((p, next), (q, _))| q[*next].exp() - p[*next].exp())
        .collect();
    near(got.mean_delta_p, mean(changes.iter().copied()), 1e-2);
    near(
        got.rms_delta_p,
        mean(changes.iter().map(|c| c * c)).sqrt(),
        1e-2,
    );
    let top = |logs: &[f64]| (0..logs.len()).max_by(|&a, &b| logs[a].total_cmp(&logs[b]));
    let same = want
        .iter()
        .zip(&other)
        .filter(|((p, _), (q, _))| top(p) == top(q));
    near(got.same_top, same.count() as f64 / kls.len() as f64, 0.01);
    near(got.reference_perplexity, plain.perplexity, 1e-3);
    near(
        got.perplexity,
        mean(other.iter().map(|(logs, next)| -logs[*next])).exp(),
        1e-5,
    );
    near(
        got.perplexity_ratio,
        got.perplexity / got.reference_perplexity,
        1e-6,
    );
    assert!(got.perplexity_ratio_error < got.perplexity_error / got.perplexity);

    refused(&model, &small, &path);
}

fn refused(model: &LoadedModel, small: &LoadedModel, path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    let with = |at: usize, new: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + new.len()].copy_from_slice(new);
        bytes
    };
    let broken = path.with_extension("broken");
    for (bytes, expected) in [
        (bytes[..bytes.len() - 1].to_vec(), "cut short"),
        (bytes[..12].to_vec(), "begin with _logits_"),
        (with(0, b"GGUF"), "begin with _logits_"),
        (with(8, &(-5i32).to_le_bytes()), "windows of 0 tokens"),
        (with(12, &i32::MAX.to_le_bytes()), "cut short or damaged"),
        (with(20, &u32::MAX.to_le_bytes()), "vocabulary of the model"),
        (
            with(20 + 4 * 7 * WINDOW, &f32::NAN.to_le_bytes()),
            "no finite numbers",
        ),
    ] {
        std::fs::write(&broken, bytes).unwrap();
        let found = SavedLogits::open(&broken);
        let error = found.and_then(|file| divergence(small, &file, &mut |_, _| {}));
        let error = error.unwrap_err();
        let told = error.to_string();
        assert!(
            told.contains(expected),
            "'{told}' does not say '{expected}'"
        );
        assert!(error.hint().is_some());
    }
    // A file of another vocabulary, of two tokens.
    let mut other = b"_logits_".to_vec();
    [8, 2, 1]
        .iter()
        .for_each(|n: &i32| other.extend(n.to_le_bytes()));
    other.resize(8 + 12 + 8 * 4 + 3 * 12, 0);
    std::fs::write(&broken, other).unwrap();
    let reference = SavedLogits::open(&broken).unwrap();
    let error = divergence(model, &reference, &mut |_, _| {}).unwrap_err();
    assert!(
        matches!(error, InferError::OtherVocabulary { .. }),
        "{error}"
    );
    let long = vec![1; 2000];
    for (ids, window) in [(&long[..], 3), (&long[..], 1999), (&long[..40], 48)] {
        let error = perplexity_of_halves(model, ids, window, None, &mut |_, _| {}).unwrap_err();
        assert!(
            matches!(error, InferError::Setting { flag: "window", .. }),
            "{error}"
        );
    }
}
