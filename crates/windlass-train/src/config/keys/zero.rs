//! The keys of `zero_optimization`.

use super::Status::{NoMeaning, Unsupported};
use super::{BOOL, COUNT, INT, Kind, Section, Status, TEXT, UNIT, YES, key, section};

const DEVICE: Kind = Kind::Choice(&["none", "cpu", "nvme"]);
const ALWAYS: Status = NoMeaning("it is always so");
const PINNED: Status = NoMeaning("there is no device that copies from pinned memory");
const ONE_AHEAD: Status =
    NoMeaning("the next unit is fetched while one computes; no more are whole at a time");
const BUFFERS: Status = NoMeaning("buffers have the size of what they hold");
const OVERLAPS: Status = NoMeaning("reading, computing and writing always overlap");
const UNITS: Status = NoMeaning("weights are gathered by units, each whole");
const COLLECTIVE: Status = NoMeaning("there is one way to reduce, in rank order");
const RESHARDS: Status = NoMeaning("every checkpoint loads at any number of ranks");
const NOTHING_TO_OVERRIDE: Status = NoMeaning("it concerns PyTorch modules");
const ZERO_PLUS_PLUS: Status = Unsupported("ZeRO++ (quantized or hierarchical communication)");
const MICS: Status = Unsupported("MiCS (partitions inside groups of ranks)");
const ZENFLOW: Status = Unsupported("ZenFlow");
const SUPER_OFFLOAD: Status = Unsupported("SuperOffload");

pub(super) const SECTIONS: &[Section] = &[
    section(
        "zero_optimization",
        &[
            key("stage", INT, "0", YES),
            key("reduce_bucket_size", INT, "500000000", YES),
            key("allgather_bucket_size", INT, "500000000", YES),
            key("sub_group_size", INT, "1000000000", YES),
            key("stage3_prefetch_bucket_size", INT, "50000000", ONE_AHEAD),
            key("stage3_param_persistence_threshold", INT, "100000", YES),
            key(
                "stage3_model_persistence_threshold",
                INT,
                "9223372036854775807",
                NoMeaning("stage3_param_persistence_threshold alone decides"),
            ),
            key("stage3_max_live_parameters", INT, "1000000000", ONE_AHEAD),
            key("stage3_max_reuse_distance", INT, "1000000000", ONE_AHEAD),
            key(
                "stage3_gather_16bit_weights_on_model_save",
                BOOL,
                "false",
                NoMeaning("every checkpoint is a Hugging Face folder too"),
            ),
            key("stage3_module_granularity_threshold", INT, "0", UNITS),
            key(
                "stage3_use_all_reduce_for_fetch_params",
                BOOL,
                "false",
                UNITS,
            ),
            key("stage3_allgather_sequential", BOOL, "false", UNITS),
            key(
                "stage3_partition_stream_chunk_size",
                INT,
                "0",
                NoMeaning("a model is built partitioned"),
            ),
            key("contiguous_gradients", BOOL, "true", ALWAYS),
            key("reduce_scatter", BOOL, "true", COLLECTIVE),
            key("use_multi_rank_bucket_allreduce", BOOL, "true", COLLECTIVE),
            key("allgather_partitions", BOOL, "true", COLLECTIVE),
            key(
                "overlap_comm",
                BOOL,
                "null",
                NoMeaning("communication overlaps where it can"),
            ),
            key(
                "round_robin_gradients",
                BOOL,
                "false",
                NoMeaning("every rank keeps its own part of each gradient"),
            ),
            key(
                "load_from_fp32_weights",
                BOOL,
                "true",
                NoMeaning("checkpoints hold the masters exactly"),
            ),
            key("elastic_checkpoint", BOOL, "false", RESHARDS),
            key(
                "ignore_unused_parameters",
                BOOL,
                "true",
                NoMeaning("a parameter without a gradient keeps its value"),
            ),
            key(
                "legacy_stage1",
                BOOL,
                "false",
                Unsupported("stage 1 is stage 1"),
            ),
            key("memory_efficient_linear", BOOL, "true", ALWAYS),
            key("override_module_apply", BOOL, "true", NOTHING_TO_OVERRIDE),
            key(
                "log_trace_cache_warnings",
                BOOL,
                "false",
                NoMeaning("the order of units is known from the start"),
            ),
            key("enable_sanity_checks", BOOL, "false", ALWAYS),
            key(
                "pipeline_loading_checkpoint",
                BOOL,
                "false",
                NoMeaning("there is no pipeline parallelism"),
            ),
            key(
                "save_muon_momentum_buffer_in_memory",
                BOOL,
                "false",
                Unsupported("all states of an optimizer are on one tier"),
            ),
            key("zero_hpz_partition_size", COUNT, "1", ZERO_PLUS_PLUS),
            key("zero_quantized_weights", BOOL, "false", ZERO_PLUS_PLUS),
            key(
                "zero_quantized_nontrainable_weights",
                BOOL,
                "false",
                ZERO_PLUS_PLUS,
            ),
            key("zero_quantized_gradients", BOOL, "false", ZERO_PLUS_PLUS),
            key("zeropp_loco_param", Kind::Any, "null", ZERO_PLUS_PLUS),
            key("mics_shard_size", Kind::Signed, "-1", MICS),
            key("mics_hierarchical_params_gather", BOOL, "false", MICS),
            key("leaf_module", Kind::Any, "null", UNITS),
        ],
    ),
    section(
        "zero_optimization.offload_param",
        &[
            key("device", DEVICE, r#""none""#, YES),
            key("nvme_path", TEXT, "null", YES),
            key("buffer_count", COUNT, "5", ONE_AHEAD),
            key("buffer_size", COUNT, "100000000", BUFFERS),
            key("max_in_cpu", INT, "1000000000", BUFFERS),
            key("pin_memory", BOOL, "true", PINNED),
        ],
    ),
    section(
        "zero_optimization.offload_optimizer",
        &[
            key("device", DEVICE, r#""none""#, YES),
            key("nvme_path", TEXT, "null", YES),
            key("buffer_count", COUNT, "4", YES),
            key("pin_memory", BOOL, "true", PINNED),
            key("pipeline_read", BOOL, "false", OVERLAPS),
            key("pipeline_write", BOOL, "false", OVERLAPS),
            key(
                "fast_init",
                BOOL,
                "false",
                NoMeaning("states are created on their tier"),
            ),
            key(
                "ratio",
                UNIT,
                "1.0",
                Unsupported("the whole optimizer is on one tier"),
            ),
            key("super_offload", BOOL, "false", SUPER_OFFLOAD),
            key(
                "cpuadam_cores_perc",
                UNIT,
                "0.8",
                NoMeaning("only SuperOffload divides the cores"),
            ),
        ],
    ),
    section(
        "zero_optimization.zenflow",
        &[
            key("topk_ratio", UNIT, "0.1", ZENFLOW),
            key(
                "select_strategy",
                Kind::Choice(&["auto", "step", "epoch"]),
                r#""auto""#,
                ZENFLOW,
            ),
            key("select_interval", Kind::Any, r#""auto""#, ZENFLOW),
            key("update_interval", Kind::Any, r#""auto""#, ZENFLOW),
            key("overlap_step", BOOL, "false", ZENFLOW),
            key("offload", BOOL, "false", ZENFLOW),
            key("auto_ratio", UNIT, "0.99", ZENFLOW),
            key("full_warm_up_rounds", INT, "0", ZENFLOW),
            key("pt_reserved_cores_perc", UNIT, "0.5", ZENFLOW),
        ],
    ),
];
