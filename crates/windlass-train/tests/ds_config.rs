//! `ds_config.json` from outside: files as users have them, every form of the text, every refusal.

use serde_json::{Value, json};
use std::path::PathBuf;
use windlass_store::Tier as Rest;
use windlass_train::config::keys::optimizer::OPTIMIZERS;
use windlass_train::config::keys::scheduler::SCHEDULERS;
use windlass_train::config::keys::{SECTIONS, Status};
use windlass_train::config::{
    Adam, Auto, Config, Context, FloatType, Invalid, NewtonSchulz, OptimizerConfig, Origin,
    Precision, ReduceOp, Stage, TagValidation, Tier,
};
use windlass_train::loss_scale::LossScale;
use windlass_train::schedule::deepspeed::Scheduler;
use windlass_train::{Error, config};

fn file(name: &str) -> String {
    let path = format!("{}/tests/ds_config/{name}.json", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(path).unwrap()
}

fn parse(text: &str) -> Result<Config, Error> {
    Config::parse("ds_config.json", text, &Context::ranks(2))
}

#[track_caller]
fn good(text: &str) -> Config {
    parse(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

#[track_caller]
fn bad(text: &str) -> Invalid {
    match parse(text) {
        Err(Error::Config(invalid)) => invalid,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("accepted: {text}"),
    }
}

/// The run that fills in the files.
fn run() -> Context {
    Context {
        auto: Auto {
            train_micro_batch_size_per_gpu: Some(4),
            gradient_accumulation_steps: Some(1),
            gradient_clipping: Some(0.5),
            lr: Some(1e-3),
            betas: Some((0.9, 0.95)),
            eps: Some(1e-7),
            weight_decay: Some(0.01),
            warmup_num_steps: Some(100),
            total_num_steps: Some(1000),
            fp16: None,
            bf16: None,
            hidden_size: Some(1024),
        },
        ..Context::ranks(4)
    }
}

#[track_caller]
fn row<'a>(config: &'a Config, key: &str) -> &'a config::Row {
    let row = config.report().iter().find(|row| row.key == key);
    row.unwrap_or_else(|| panic!("{key} is not in the report"))
}

#[test]
fn accelerate_shaped_files_with_a_run_that_fills_them() {
    let load = |name: &str| Config::parse(name, &file(name), &run()).unwrap();
    let one = load("zero_stage1");
    assert_eq!(one.zero.stage, Stage::OptimizerStates);
    assert_eq!(
        (
            one.batch.train_batch_size,
            one.batch.gradient_accumulation_steps
        ),
        (16, 1)
    );
    assert_eq!(one.gradient_clipping, Some(0.5));
    let adam = Adam {
        lr: 1e-3,
        betas: (0.9, 0.95),
        eps: 1e-7,
        weight_decay: 0.01,
        bias_correction: true,
    };
    assert_eq!(one.optimizer, Some(OptimizerConfig::AdamW(adam)));
    let Some(Scheduler::WarmupDecayLR {
        min,
        max,
        warmup,
        total,
    }) = one.scheduler
    else {
        panic!("{:?}", one.scheduler);
    };
    assert_eq!((min, max, warmup.steps, total), (0.0, 1e-3, 100, 1000));
    assert_eq!(one.zero.reduce_bucket_size, 1024 * 1024);
    assert_eq!(one.observe.steps_per_print, Some(500));

    let two = load("zero_stage2");
    assert_eq!(two.zero.allgather_bucket_size, 300_000_000);
    let dynamic = LossScale::Dynamic {
        initial_scale_power: 12,
        loss_scale_window: 500,
        hysteresis: 3,
        consecutive_hysteresis: false,
        min_loss_scale: 1.0,
    };
    assert_eq!(
        two.precision,
        Precision::Fp16 {
            loss_scale: dynamic
        }
    );
    // The file leaves the betas open: they are the run's.
    let Some(OptimizerConfig::AdamW(adam)) = two.optimizer else {
        panic!("{:?}", two.optimizer);
    };
    assert_eq!((adam.betas, adam.weight_decay), ((0.9, 0.95), 0.01));

    let mut bf16 = run();
    bf16.auto = Auto {
        bf16: Some(true),
        fp16: Some(false),
        ..Auto::default()
    };
    let offload = Config::parse("f", &file("zero_stage2_offload"), &bf16).unwrap();
    assert_eq!(offload.precision.float_type(), FloatType::Bf16);
    assert_eq!(offload.zero.offload_optimizer.device, Tier::Cpu);
    assert_eq!(offload.batch.train_batch_size, 32);
    assert!(matches!(offload.optimizer, Some(OptimizerConfig::AdamW(adam)) if adam.lr == 2e-5));

    let three = load("zero_stage3");
    let zero = &three.zero;
    let sizes = [
        zero.reduce_bucket_size,
        zero.stage3_prefetch_bucket_size,
        zero.stage3_param_persistence_threshold,
    ];
    assert_eq!(sizes, [1_048_576, 943_718, 10_240]);
    assert!(!zero.stage3_gather_16bit_weights_on_model_save);
    assert!(matches!(
        three.precision,
        Precision::Bf16 {
            bf16_optimizer_states: true,
            ..
        }
    ));
    assert!(
        matches!(three.scheduler, Some(Scheduler::WarmupCosineLR { base, .. }) if base == 1e-3)
    );
}

#[test]
fn a_file_that_needs_no_run() {
    let mut context = run();
    context.auto = Auto::default();
    let config = Config::parse("f", &file("zero_stage3_offload"), &context).unwrap();
    let nvme = Tier::Nvme("/fast".into());
    assert_eq!(config.zero.offload_param.device, nvme);
    assert_eq!(
        (
            config.zero.offload_param.buffer_count,
            config.zero.offload_param.buffer_size
        ),
        (5, 200_000_000)
    );
    assert_eq!(config.zero.offload_optimizer.buffer_count, 6);
    assert!(config.zero.offload_optimizer.pipeline_read);
    assert_eq!(config.zero.sub_group_size, 1_000_000_000_000);
    assert_eq!(
        (config.aio.block_size, config.aio.intra_op_parallelism),
        (262_144, 2)
    );
    assert_eq!(config.gradient_clipping, None);
    assert_eq!(config.batch.gradient_accumulation_steps, 4);
    let activations = config.activation_checkpointing.as_ref().unwrap();
    assert_eq!(
        (
            activations.number_checkpoints,
            activations.cpu_checkpointing
        ),
        (Some(4), true)
    );
    assert_eq!(
        config.observe.csv_monitor.as_ref().unwrap().job_name,
        "night"
    );
    assert_eq!(
        config.observe.comms_logger.as_ref().unwrap().prof_ops,
        ["all_reduce"]
    );
    let profiler = config.observe.flops_profiler.as_ref().unwrap();
    assert_eq!(profiler.profile_step, 3);
    assert!(
        config
            .notes()
            .iter()
            .any(|note| note.contains("thread_count is an older name"))
    );
    assert!(
        config
            .notes()
            .iter()
            .any(|note| note.starts_with("wandb.project is off"))
    );
}

#[test]
fn what_the_defaults_are() {
    let config = good(r#"{"train_micro_batch_size_per_gpu": 1}"#);
    assert_eq!(config.gradient_clipping, Some(1.0));
    assert_eq!(config.precision, Precision::Fp32);
    assert_eq!(config.zero.stage, Stage::Disabled);
    assert_eq!(
        config.zero.stage3_model_persistence_threshold,
        i64::MAX as usize
    );
    assert_eq!(config.reduction.op, ReduceOp::Mean);
    assert_eq!(config.tag_validation, TagValidation::Warn);
    assert!(!config.async_checkpoints && !config.placement().reduce_once);
    let other = r#"{"train_micro_batch_size_per_gpu": 1, "sync_each_batch": false, "optimizer": {"type": "Adam"},
        "checkpoint": {"writer": {"decoupled": true}}}"#;
    let kept =
        r#"{"train_micro_batch_size_per_gpu": 1, "data_types": {"grad_accum_dtype": "bfloat16"}}"#;
    assert_eq!(
        good(kept).placement().grad_accum,
        windlass_tensor::DType::Bf16
    );
    let other = good(other);
    assert!(other.placement().reduce_once && other.engine_options().unwrap().async_checkpoints);
    assert_eq!((config.optimizer, config.scheduler), (None, None));
    assert!(config.activation_checkpointing.is_none());
    assert!(config.notes().is_empty(), "{:?}", config.notes());
    assert!(config.report().iter().all(|row| matches!(
        row.origin,
        Origin::Default | Origin::Inferred
    ) || row.key == "train_micro_batch_size_per_gpu"));
}

#[test]
fn the_batch_triple() {
    let mut world = 2;
    let mut check = |train: Option<u64>,
                     micro: Option<u64>,
                     steps: Option<u64>,
                     expected: Result<[u64; 3], &str>| {
        let batch = config::Batch::infer(train, micro, steps, world);
        let batch = batch.map(|b| {
            world = b.world_size;
            [
                b.train_batch_size,
                b.train_micro_batch_size_per_gpu,
                b.gradient_accumulation_steps,
            ]
        });
        assert_eq!(
            batch,
            expected.map_err(str::to_owned),
            "{train:?} {micro:?} {steps:?}"
        );
    };
    check(Some(32), Some(16), Some(1), Ok([32, 16, 1]));
    check(Some(32), Some(8), Some(2), Ok([32, 8, 2]));
    check(Some(32), Some(8), None, Ok([32, 8, 2]));
    check(Some(32), None, Some(4), Ok([32, 4, 4]));
    check(None, Some(8), Some(3), Ok([48, 8, 3]));
    check(Some(32), None, None, Ok([32, 16, 1]));
    check(None, Some(8), None, Ok([16, 8, 1]));
    let neither = "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided";
    check(None, None, None, Err(neither));
    check(None, None, Some(4), Err(neither));
    let product = "Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * \
                   gradient_acc_step * world_size";
    check(
        Some(33),
        Some(17),
        Some(2),
        Err(&format!("{product} 33 != 17 * 2 * 2")),
    );
    check(
        Some(32),
        Some(18),
        Some(1),
        Err(&format!("{product} 32 != 18 * 1 * 2")),
    );
    check(
        Some(33),
        Some(8),
        None,
        Err(&format!("{product} 33 != 8 * 2 * 2")),
    );
    check(
        Some(33),
        None,
        None,
        Err(&format!("{product} 33 != 16 * 1 * 2")),
    );
    check(
        Some(8),
        Some(16),
        None,
        Err("Gradient accumulation steps: 0 has to be greater than 0"),
    );
    check(
        Some(1),
        None,
        None,
        Err("Micro batch size per gpu: 0 has to be greater than 0"),
    );
}

#[test]
fn every_form_of_the_text_is_the_same_configuration() {
    let plain = r#"{"train_batch_size": 8, "zero_optimization": {"stage": 2, "reduce_bucket_size": 500000},
                    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.8, 0.9]}}}"#;
    let expected = good(plain);
    let relaxed = "
        # a comment
        {
            // another
            train_batch_size: 8, /* and
                one more */
            'zero_optimization': {stage: 2, \"reduce_bucket_size\": 5e5,},
            optimizer: {
                type: AdamW
                params: {
                    lr: 1e-3  # the rate
                    betas: [0.8, .9,],
                },
            },
        }";
    let braceless = "
        train_batch_size: 8
        zero_optimization: {\n stage: 2.0 // whole\n reduce_bucket_size: 5.0e5 }
        optimizer: { type: '''AdamW''', params: {lr: +1e-3, betas: [8e-1\n 0.9]} }";
    let spaced = "\u{feff}\r\n{\r\n\"train_batch_size\"\t:\t8\r\n,\"zero_optimization\": {\"stage\":2,\"reduce_bucket_size\":5E5}\r\n\
        optimizer: {type: \"\\u0041damW\"\r\nparams: {lr: 0.1e-2\r\nbetas: [0.8, 0.90]}}}";
    let base64 = encode(plain);
    for text in [
        relaxed,
        braceless,
        spaced,
        &base64,
        &format!("  {}\n", base64.trim_end_matches('=')),
    ] {
        let config = good(text);
        assert_eq!(config.fingerprint(), expected.fingerprint(), "{text}");
        assert_eq!(
            (config.batch, config.zero, config.optimizer),
            (expected.batch, expected.zero.clone(), expected.optimizer)
        );
    }
    let value: Value = serde_json::from_str(plain).unwrap();
    let config = Config::from_value("a program", value, &Context::ranks(2)).unwrap();
    assert_eq!(config.fingerprint(), expected.fingerprint());
    let other = Config::parse("f", plain, &Context::ranks(4)).unwrap();
    assert_ne!(other.fingerprint(), expected.fingerprint());
    // In place of a path, too.
    let config = Config::load(base64.as_ref(), &Context::ranks(2)).unwrap();
    assert_eq!(config.fingerprint(), expected.fingerprint());
    assert!(matches!(
        Config::load("no such file".as_ref(), &Context::ranks(2)),
        Err(Error::Io { .. })
    ));
}

fn encode(text: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut coded = String::new();
    for bytes in text.as_bytes().chunks(3) {
        let word = bytes
            .iter()
            .fold(0u32, |word, byte| word << 8 | u32::from(*byte))
            << (8 * (3 - bytes.len()));
        for digit in 0..4 {
            match digit <= bytes.len() {
                true => coded.push(DIGITS[(word >> (18 - 6 * digit) & 63) as usize] as char),
                false => coded.push('='),
            }
        }
    }
    coded
}

#[test]
fn texts_that_are_none_say_where() {
    for (text, line, message) in [
        ("", 1, "the file is empty"),
        ("[1]", 1, "this is a list"),
        (
            "{\n\"a\": 1,\n \"a\": 2}",
            3,
            "duplicate key \"a\": lines 2 and 3",
        ),
        (
            "{zero_optimization:\n{stage: 1\nstage: 2}}",
            3,
            "duplicate key \"stage\": lines 2 and 3",
        ),
        ("{\"a\": 1", 1, "has no }"),
        ("{\"a\": [1", 1, "has no ]"),
        ("{\"a\" 1}", 1, "':' is expected"),
        ("{\"a\": }", 1, "a value is expected"),
        ("{\"a\":", 1, "the text ends"),
        ("{\"a\": \"b}", 1, "does not end"),
        ("{\"a\": \"b\n\"}", 1, "does not end"),
        ("{\"a\": \"\\x\"}", 1, "escape"),
        ("{\"a\": \"\\ud800\"}", 1, "half of a pair"),
        ("{\n/* }", 2, "no end"),
        ("{\"a\": [on off, 1]}", 1, "on is not a number"),
        ("{\"a\": 1} x", 1, "after the end"),
        ("{:}", 1, "a key is expected"),
        ("}", 1, "a key is expected"),
        (&format!("{}1", "{a:".repeat(100)), 1, "more than 64 levels"),
        (
            &format!("a: {}", "[".repeat(100_000)),
            1,
            "more than 64 levels",
        ),
    ] {
        let invalid = bad(text);
        let [problem] = &invalid.problems[..] else {
            panic!("{invalid}");
        };
        assert!(problem.message.contains(message), "{problem}");
        assert_eq!(problem.line, Some(line), "{problem}");
    }
    let nested = bad("{zero_optimization:\n{stage: 1\nstage: 2}}");
    assert_eq!(nested.problems[0].key, "zero_optimization.stage");
    let invalid = Config::from_value("f", json!([1]), &Context::ranks(1)).unwrap_err();
    assert!(invalid.to_string().contains("is an object"));
}

/// A file with one thing wrong: the key that is named, the message, and the hint.
#[test]
fn each_refusal_names_the_key_and_says_what_to_do() {
    let check = |text: &str, key: &str, message: &str, hint: &str| {
        let text = format!("{{train_micro_batch_size_per_gpu: 1\n{text}\n}}");
        let invalid = bad(&text);
        let [problem] = &invalid.problems[..] else {
            panic!("{invalid}");
        };
        assert_eq!(problem.key, key, "{problem}");
        assert!(problem.message.contains(message), "{problem}");
        let given = problem.hint.clone().unwrap_or_default();
        assert!(given.contains(hint), "{problem}: {given}");
    };
    // Unknown names.
    check(
        "zero_optimisation: {}",
        "zero_optimisation",
        "unknown key",
        "nearest known: zero_optimization",
    );
    check(
        "zero_optimization: {stge: 1}",
        "zero_optimization.stge",
        "unknown key",
        "zero_optimization.stage",
    );
    check(
        "stage: 3",
        "stage",
        "unknown key",
        "did you mean zero_optimization.stage?",
    );
    check(
        "fp16: {loss_scale_windw: 3}",
        "fp16.loss_scale_windw",
        "unknown key",
        "fp16.loss_scale_window",
    );
    check(
        "optimizer: {type: Adam2}",
        "optimizer.type",
        "unknown optimizer \"Adam2\"",
        "nearest known: adam;",
    );
    check(
        "optimizer: {params: {}}",
        "optimizer.type",
        "missing",
        "AdamW",
    );
    check(
        "optimizer: {type: \"SGD\", params: {beta: 1}}",
        "optimizer.params.beta",
        "unknown key",
        "nearest",
    );
    check(
        "optimizer: {type: \"Lion\", params: {max_grad_norm: 1}}",
        "optimizer.params.max_grad_norm",
        "unknown",
        "gradient_clipping",
    );
    check(
        "scheduler: {type: \"Warmup\", params: {x: 1}}",
        "scheduler.type",
        "unknown scheduler",
        "WarmupLR",
    );
    check(
        "scheduler: {params: {}}",
        "scheduler.type",
        "missing",
        "WarmupLR",
    );
    // Kinds.
    check(
        "zero_optimization: {stage: 4}",
        "zero_optimization.stage",
        "4 is no stage",
        "0, 1, 2 and 3",
    );
    check(
        "zero_optimization: {stage: \"two\"}",
        "zero_optimization.stage",
        "an integer is expected",
        "",
    );
    check("zero_optimization: 3", "zero_optimization", "an object", "");
    check(
        "zero_optimization: {reduce_bucket_size: 1.5}",
        "zero_optimization.reduce_bucket_size",
        "an integer",
        "",
    );
    check(
        "zero_optimization: {reduce_bucket_size: -1}",
        "zero_optimization.reduce_bucket_size",
        "an integer",
        "",
    );
    check(
        "aio: {queue_depth: 0}",
        "aio.queue_depth",
        "an integer of at least 1",
        "",
    );
    check(
        "aio: {queue_depth: 1e99}",
        "aio.queue_depth",
        "an integer",
        "",
    );
    check(
        "gradient_clipping: -1",
        "gradient_clipping",
        "not negative",
        "",
    );
    check(
        "gradient_clipping: true",
        "gradient_clipping",
        "a number",
        "",
    );
    check(
        "wall_clock_breakdown: 1",
        "wall_clock_breakdown",
        "true or false",
        "",
    );
    check(
        "communication_data_type: int8",
        "communication_data_type",
        "fp32, fp16 or bf16",
        "",
    );
    check(
        "sync_each_batch: false, zero_optimization: {stage: 2}",
        "sync_each_batch",
        "keeps only a part of the gradients",
        "stage to 0 or 1",
    );
    check(
        "checkpoint: {writer: {decoupled: true}}, zero_optimization: {stage: 1, offload_optimizer: {device: \"nvme\", nvme_path: \"/x\"}}",
        "checkpoint.writer.decoupled",
        "the copy in memory",
        "offload to",
    );
    for (more, message, hint) in [
        (
            "data_types: {grad_accum_dtype: fp16}",
            "loss scale",
            "\"bf16\"",
        ),
        (
            "data_types: {grad_accum_dtype: bf16}, sync_each_batch: false",
            "added up on each rank",
            "sync_each_batch",
        ),
        (
            "data_types: {grad_accum_dtype: bf16}, zero_optimization: {stage: 2, offload_optimizer: {device: \"nvme\", nvme_path: \"/x\"}}",
            "rest on a disk",
            "in memory",
        ),
    ] {
        check(more, "data_types.grad_accum_dtype", message, hint);
    }
    check(
        "checkpoint: {tag_validation: maybe}",
        "checkpoint.tag_validation",
        "one of ignore, warn, fail",
        "",
    );
    check(
        "optimizer: {type: \"Adam\", params: {betas: [0.9]}}",
        "optimizer.params.betas",
        "two numbers",
        "",
    );
    check(
        "optimizer: {type: \"Adam\", params: {betas: [0.9, 1]}}",
        "optimizer.params.betas",
        "below 1",
        "",
    );
    check(
        "csv_monitor: {output_path: 3}",
        "csv_monitor.output_path",
        "a text",
        "",
    );
    check(
        "comms_logger: {prof_ops: all}",
        "comms_logger.prof_ops",
        "a list",
        "",
    );
    check(
        "comms_logger: {enabled: true, prof_ops: [1]}",
        "comms_logger.prof_ops",
        "a list of texts",
        "",
    );
    check(
        "comms_logger: {enabled: true, prof_all: false}",
        "comms_logger.prof_ops",
        "nothing would be logged",
        "list",
    );
    check(
        "comms_logger: {enabled: true, prof_all: false, prof_ops: [\"all_gather_base\", \"gossip\"]}",
        "comms_logger.prof_ops",
        "no collective is called \"gossip\"",
        "all_reduce",
    );
    // Settings that do not go together.
    check(
        "fp16: {enabled: true}, bf16: {enabled: true}",
        "fp16.enabled",
        "cannot be simultaneously enabled",
        "off",
    );
    check(
        "fp16: {enabled: true, initial_scale_power: 200}",
        "fp16.initial_scale_power",
        "more than 126",
        "16",
    );
    check(
        "zero_optimization: {stage: 3}, gradient_allreduce_op: \"sum\"",
        "gradient_allreduce_op",
        "stage 3",
        "mean",
    );
    let param = "zero_optimization.offload_param";
    check(
        "zero_optimization: {stage: 2, offload_param: {device: \"cpu\"}}",
        &format!("{param}.device"),
        "stage 3 only",
        "none",
    );
    check(
        "zero_optimization: {stage: 3, offload_param: {device: \"nvme\"}}",
        &format!("{param}.nvme_path"),
        "missing",
        "folder",
    );
    check(
        "zero_optimization: {stage: 3, offload_param: {device: \"nvme\", nvme_path: \"/a\"}, \
         offload_optimizer: {device: \"nvme\", nvme_path: \"/b\"}}",
        &format!("{param}.nvme_path"),
        "one swap file",
        "same folder",
    );
    check(
        "zero_optimization: {stage: 3, offload_param: {device: \"nvme\", nvme_path: \"/a\"}}, \
         activation_checkpointing: {nvme_path: \"/b\"}",
        "activation_checkpointing.nvme_path",
        "one swap file",
        "same folder",
    );
    check(
        "zero_optimization: {offload_optimizer: {device: \"cpu\"}}",
        "zero_optimization.offload_optimizer.device",
        "stage 0",
        "1, 2 or 3",
    );
    check(
        "zero_optimization: {stage: 2, cpu_offload: true, offload_optimizer: {device: \"cpu\"}}",
        "zero_optimization.cpu_offload",
        "given as well",
        "remove",
    );
    check(
        "scheduler: {type: \"WarmupDecayLR\"}",
        "scheduler.params.total_num_steps",
        "missing",
        "auto",
    );
    check(
        "scheduler: {type: \"WarmupLR\"}",
        "scheduler.type",
        "from the optimizer",
        "optimizer.params.lr",
    );
    check(
        "scheduler: {type: \"WarmupLR\", params: {warmup_num_steps: 0}}, optimizer: {type: \"Adam\"}",
        "scheduler.params.warmup_num_steps",
        "at least 1",
        "",
    );
    // What is not there.
    check(
        "optimizer: {type: \"OneBitAdam\", params: {freeze_step: 3}}",
        "optimizer.type",
        "not supported",
        "AdamW",
    );
    check(
        "zero_optimization: {zero_quantized_weights: true}",
        "zero_optimization.zero_quantized_weights",
        "ZeRO++",
        "remove",
    );
    check(
        "zero_optimization: {mics_shard_size: 4}",
        "zero_optimization.mics_shard_size",
        "MiCS",
        "remove",
    );
    check(
        "zero_optimization: {stage: 3, offload_optimizer: {device: \"cpu\", ratio: 0.3}}",
        "zero_optimization.offload_optimizer.ratio",
        "0.3 is not supported",
        "remove",
    );
    check(
        "tensor_parallel: {autotp_size: 4}",
        "tensor_parallel.autotp_size",
        "tensor parallelism",
        "remove",
    );
    check("amp: {enabled: true}", "amp.enabled", "bf16", "remove");
    check(
        "curriculum_learning: {enabled: true}",
        "curriculum_learning.enabled",
        "curriculum",
        "remove",
    );
    check(
        "compression_training: {weight_quantization: {shared_parameters: {enabled: true}}}",
        "compression_training.weight_quantization.shared_parameters.enabled",
        "compression",
        "remove",
    );
    check(
        "data_types: {param_dtype: \"bf16\"}",
        "data_types.param_dtype",
        "not supported",
        "remove",
    );
}

/// Inputs of layers rest on the disk if a folder is given, in memory if not, where `cpu_checkpointing` puts them too.
#[test]
fn where_activation_checkpoints_rest() {
    for (section, tier, folder, cpu) in [
        ("{}", Rest::Memory, None, false),
        ("{cpu_checkpointing: true}", Rest::Memory, None, true),
        ("{nvme_path: \"/a\"}", Rest::Nvme, Some("/a"), false),
    ] {
        let config = good(&format!(
            "{{train_batch_size: 2, activation_checkpointing: {section}}}"
        ));
        let placement = config.placement();
        assert_eq!(placement.activations, tier, "{section}");
        let swap = config.swap().map(|(folder, _)| folder);
        assert_eq!(swap, folder.map(PathBuf::from), "{section}");
        assert_eq!(config.offloads_to_cpu(), cpu, "{section}");
    }
}

#[test]
fn what_is_off_is_a_note_and_not_an_error() {
    let config = good(
        "train_micro_batch_size_per_gpu: 1
        amp: {enabled: false, opt_level: O1}
        elasticity: {enabled: false, max_gpus: 7}
        tensor_parallel: {autotp_size: 0}
        compression_training: {weight_quantization: {shared_parameters: {enabled: false}, different_groups: {a: {params: {}}}}}
        zero_optimization: {stage: 2, overlap_comm: true, zero_quantized_weights: false, offload_optimizer: {device: cpu, ratio: 1\n}}
        expert_parallel: {enabled: false, something_new: 3}",
    );
    let notes = config.notes().join("\n");
    for expected in [
        "amp.opt_level is off",
        "elasticity.max_gpus is off; it would not be supported: the number of ranks",
        "tensor_parallel.autotp_size is off",
        "compression_training.weight_quantization.different_groups is off",
        "zero_optimization.overlap_comm has no meaning here: ",
        "zero_optimization.offload_optimizer.ratio is off",
        "expert_parallel.something_new is off",
    ] {
        assert!(notes.contains(expected), "{expected} in\n{notes}");
    }
}

#[test]
fn older_names_are_read_and_noted() {
    let config = good(
        "train_micro_batch_size_per_gpu: 1
        bfloat16: {enabled: true}
        zero_optimization: {
            stage: 3, cpu_offload: true, cpu_offload_param: true, cpu_offload_use_pin_memory: true
            stage3_gather_fp16_weights_on_model_save: true, prefetch_bucket_size: 7, max_live_parameters: 8
        }
        aio: {thread_count: 3}",
    );
    assert_eq!(config.precision.float_type(), FloatType::Bf16);
    assert_eq!(config.zero.offload_optimizer.device, Tier::Cpu);
    assert_eq!(config.zero.offload_param.device, Tier::Cpu);
    assert!(config.zero.stage3_gather_16bit_weights_on_model_save);
    assert_eq!(
        (
            config.zero.stage3_prefetch_bucket_size,
            config.zero.stage3_max_live_parameters
        ),
        (7, 8)
    );
    assert_eq!(config.aio.intra_op_parallelism, 3);
    assert_eq!(config.notes().len(), 11, "{:#?}", config.notes());
    let origin = &row(&config, "aio.intra_op_parallelism").origin;
    assert_eq!(origin.to_string(), "alias thread_count, line 7");
    assert!(
        matches!(&row(&config, "bf16.enabled").origin, Origin::Alias { name, line: 2 } if name == "bfloat16")
    );
    for (form, stage) in [("true", Stage::OptimizerStates), ("false", Stage::Disabled)] {
        let config = good(&format!(
            "{{train_batch_size: 2, zero_optimization: {form}}}"
        ));
        assert_eq!(config.zero.stage, stage);
        assert_eq!(config.notes().len(), 1);
    }
    let off = good("train_batch_size: 2\nzero_optimization: {stage: 2, cpu_offload: false}");
    assert_eq!(off.zero.offload_optimizer.device, Tier::None);
}

#[test]
fn every_optimizer_with_its_parameters_and_defaults() {
    let check = |text: &str, expected: OptimizerConfig| {
        let config = good(&format!("{{train_batch_size: 2, optimizer: {{{text}}}}}"));
        assert_eq!(config.optimizer, Some(expected), "{text}");
        let json = serde_json::to_string(&expected).unwrap();
        assert_eq!(
            serde_json::from_str::<OptimizerConfig>(&json).unwrap(),
            expected
        );
    };
    let adam = Adam {
        lr: 1e-3,
        betas: (0.9, 0.999),
        eps: 1e-8,
        weight_decay: 0.0,
        bias_correction: true,
    };
    let decayed = Adam {
        weight_decay: 0.01,
        ..adam
    };
    check(r#"type: "Adam""#, OptimizerConfig::AdamW(adam));
    check(
        r#"type: "adam", params: {adam_w_mode: false, bias_correction: false}"#,
        OptimizerConfig::Adam(Adam {
            bias_correction: false,
            ..adam
        }),
    );
    check(
        r#"type: "AdamW", params: {adam_w_mode: false}"#,
        OptimizerConfig::AdamW(adam),
    );
    check(
        r#"type: "AdamW", params: {torch_adam: true}"#,
        OptimizerConfig::AdamW(decayed),
    );
    check(
        r#"type: "Adam", params: {torch_adam: true}"#,
        OptimizerConfig::AdamW(decayed),
    );
    check(
        r#"type: "Adam", params: {torch_adam: true, adam_w_mode: false}"#,
        OptimizerConfig::Adam(adam),
    );
    check(
        r#"type: "AdamW8bit", params: {lr: 2}"#,
        OptimizerConfig::AdamW8bit {
            adam: Adam { lr: 2.0, ..decayed },
            min_8bit_size: 4096,
        },
    );
    check(
        r#"type: "Adagrad""#,
        OptimizerConfig::Adagrad {
            lr: 0.01,
            eps: 1e-10,
            weight_decay: 0.0,
        },
    );
    check(
        r#"type: "Lion", params: {betas: [0.95, 0.98], weight_decay: 1}"#,
        OptimizerConfig::Lion {
            lr: 1e-3,
            betas: (0.95, 0.98),
            weight_decay: 1.0,
        },
    );
    check(
        r#"type: "Lamb", params: {max_coeff: 0.3}"#,
        OptimizerConfig::Lamb {
            adam,
            max_coeff: 0.3,
            min_coeff: 0.01,
        },
    );
    check(
        r#"type: "SGD", params: {lr: 0.1, momentum: 0.9, nesterov: true}"#,
        OptimizerConfig::Sgd {
            lr: 0.1,
            momentum: 0.9,
            dampening: 0.0,
            weight_decay: 0.0,
            nesterov: true,
        },
    );
    let rest = Adam {
        betas: (0.9, 0.95),
        eps: 1e-10,
        ..adam
    };
    check(
        r#"type: "Muon", params: {lr: 0.02, adam_lr: 3e-4, weight_decay: 0.1}"#,
        OptimizerConfig::Muon {
            lr: 0.02,
            momentum: 0.95,
            weight_decay: 0.1,
            ns_method: NewtonSchulz::Gram,
            adam: Adam {
                lr: 3e-4,
                weight_decay: 0.1,
                ..rest
            },
        },
    );
    check(
        r#"type: "muon", params: {muon_lr: 0.05, ns_method: "standard"}"#,
        OptimizerConfig::Muon {
            lr: 0.05,
            momentum: 0.95,
            weight_decay: 0.0,
            ns_method: NewtonSchulz::Standard,
            adam: rest,
        },
    );
}

#[test]
fn every_scheduler_reads_its_parameters() {
    let check = |text: &str, at: u64, lr: f64| {
        let config = good(&format!(
            "{{train_batch_size: 2, optimizer: {{type: \"Adam\", params: {{lr: 0.5}}}}, scheduler: {{{text}}}}}"
        ));
        let scheduler = config.scheduler.unwrap();
        assert_eq!(scheduler.lr(at), lr, "{text}");
        let json = serde_json::to_string(&scheduler).unwrap();
        assert_eq!(serde_json::from_str::<Scheduler>(&json).unwrap(), scheduler);
    };
    check(r#"type: "WarmupLR""#, 1000, 0.5);
    check(
        r#"type: "WarmupLR", params: {warmup_max_lr: 2, warmup_num_steps: 4, warmup_type: "linear"}"#,
        1,
        0.5,
    );
    check(
        r#"type: "WarmupDecayLR", params: {total_num_steps: 10, warmup_num_steps: 2}"#,
        6,
        0.0005,
    );
    check(
        r#"type: "WarmupCosineLR", params: {total_num_steps: 10, warmup_num_steps: 2, cos_min_ratio: 0}"#,
        5,
        0.25,
    );
    check(
        r#"type: "OneCycle", params: {cycle_min_lr: 1, cycle_max_lr: 3, cycle_first_step_size: 4}"#,
        1,
        2.0,
    );
    check(
        r#"type: "LRRangeTest", params: {lr_range_test_min_lr: 1, lr_range_test_step_size: 2}"#,
        1,
        2.0,
    );
    // SGD has no betas to cycle.
    let config = good(
        "{train_batch_size: 2, optimizer: {type: \"SGD\"}, scheduler: {type: \"OneCycle\", params: {cycle_min_lr: 1, cycle_max_lr: 3}}}",
    );
    assert_eq!(config.scheduler.unwrap().betas(3), None);
    assert!(
        config.notes()[0].contains("no betas"),
        "{:?}",
        config.notes()
    );
}

#[test]
fn a_run_and_its_file_must_agree() {
    let context = |auto: Auto| Context {
        auto,
        ..Context::ranks(2)
    };
    let text = r#"{"train_micro_batch_size_per_gpu": 3, "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}}}"#;
    let same = Auto {
        train_micro_batch_size_per_gpu: Some(3),
        lr: Some(0.001),
        betas: Some((0.9, 0.95)),
        eps: Some(1e-3),
        ..Auto::default()
    };
    let config = Config::parse("f", text, &context(same)).unwrap();
    // What the file does not mention is the run's: a flag is never passed over.
    assert!(matches!(config.optimizer, Some(OptimizerConfig::AdamW(adam)) if adam.eps == 1e-3));
    let other = Auto {
        train_micro_batch_size_per_gpu: Some(4),
        lr: Some(0.002),
        ..Auto::default()
    };
    let Err(Error::Config(invalid)) = Config::parse("f", text, &context(other)) else {
        panic!("accepted");
    };
    let keys: Vec<&str> = invalid
        .problems
        .iter()
        .map(|problem| problem.key.as_str())
        .collect();
    assert_eq!(
        keys,
        ["train_micro_batch_size_per_gpu", "optimizer.params.lr"]
    );
    assert_eq!(
        invalid.problems[1].message,
        "0.001 in the file, 0.002 on the command line"
    );
    // A setting of the command line stands before both.
    let mut set = context(other);
    set.overrides = vec![
        ("train_micro_batch_size_per_gpu".into(), json!(8)),
        ("optimizer.params.lr".into(), json!("auto")),
        (
            "zero_optimization.offload_optimizer.device".into(),
            json!("cpu"),
        ),
        ("zero_optimization.stage".into(), json!(1)),
    ];
    let config = Config::parse("f", text, &set).unwrap();
    assert_eq!(config.batch.train_batch_size, 16);
    assert_eq!(config.optimizer.unwrap().lr(), 0.002);
    assert_eq!(config.zero.offload_optimizer.device, Tier::Cpu);
    assert_eq!(
        row(&config, "zero_optimization.stage").origin,
        Origin::CommandLine
    );
    set.overrides = vec![("train_micro_batch_size_per_gpu.x".into(), json!(8))];
    assert!(Config::parse("f", text, &set).is_err());
}

#[test]
fn auto_without_a_run_is_the_default() {
    let config = good(
        r#"{"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
            "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}}"#,
    );
    assert_eq!(config.batch.gradient_accumulation_steps, 1);
    assert_eq!(config.gradient_clipping, Some(1.0));
    assert_eq!(config.zero.reduce_bucket_size, 500_000_000);
    let remark = "gradient_clipping is \"auto\" and the run does not say: the default is 1.0";
    assert_eq!(config.remarks()[0], remark);
    assert_eq!(config.notes().len(), 4, "{:?}", config.notes());
    assert_eq!(row(&config, "gradient_clipping").origin.to_string(), "auto");
    let invalid = bad(r#"{"train_micro_batch_size_per_gpu": "auto"}"#);
    assert!(
        invalid.to_string().contains("needs to be provided"),
        "{invalid}"
    );
    assert!(invalid.hint().unwrap().contains("auto"));
    let two = bad("{train_batch_size: 3\nfp61: {}}");
    let expected = "ds_config.json: 2 problems\n  line 1: train_batch_size: Check batch";
    assert!(two.to_string().starts_with(expected), "{two}");
    assert!(
        two.to_string()
            .contains("fp61: unknown key (nearest known: fp16)"),
        "{two}"
    );
    assert!(two.hint().unwrap().contains("config check"));
}

#[test]
fn the_report_has_every_key_once() {
    let text = file("zero_stage1");
    let config = Config::parse("f", &text, &run()).unwrap();
    let tables: usize = SECTIONS
        .iter()
        .copied()
        .flatten()
        .map(|section| section.keys.len())
        .sum();
    // AdamW has 12 parameters and WarmupDecayLR 6.
    assert_eq!(config.report().len(), tables + 12 + 6);
    let mut keys: Vec<&str> = config.report().iter().map(|row| row.key.as_str()).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), config.report().len());
    for (key, value, origin, status) in [
        ("zero_optimization.stage", json!(1), "line 11", "honoured"),
        (
            "zero_optimization.reduce_bucket_size",
            json!(1_048_576),
            "auto",
            "honoured",
        ),
        ("train_batch_size", json!(16), "auto", "honoured"),
        ("fp16.enabled", json!(false), "default", "honoured"),
        (
            "optimizer.params.torch_adam",
            json!(false),
            "default",
            "no meaning here",
        ),
        ("amp.enabled", json!(false), "default", "not supported"),
    ] {
        let row = row(&config, key);
        let found = (&row.value, row.origin.to_string(), row.status.name());
        assert_eq!(found, (&value, origin.to_owned(), status), "{key}");
        let row = serde_json::to_value(row).unwrap();
        assert_eq!((&row["key"], &row["from"]), (&json!(key), &json!(origin)));
    }
}

#[test]
fn the_tables_of_keys_are_sound() {
    let optimizers = OPTIMIZERS.iter().filter_map(|known| known.params.ok());
    let schedulers = SCHEDULERS.iter().map(|(_, params)| *params);
    let sections = SECTIONS.iter().copied().flatten();
    let keys = sections
        .map(|section| section.keys)
        .chain(optimizers)
        .chain(schedulers);
    for key in keys.flatten() {
        let default: Value =
            serde_json::from_str(key.default).unwrap_or_else(|_| panic!("{}", key.name));
        if let Status::NoMeaning(why) | Status::Unsupported(why) = key.status {
            assert!(!why.is_empty() && !why.ends_with('.'), "{}", key.name);
        }
        assert!(!default.is_object(), "{}", key.name);
    }
}
