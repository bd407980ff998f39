//! Sections that ask for what is not there: known by name, errors when they are switched on.

use super::Status::Unsupported;
use super::{BOOL, COUNT, INT, Kind, NUMBER, Section, Status, TEXT, UNIT, key, section};

const APEX: Status = Unsupported("Apex is a CUDA library; use \"bf16\"");
const AUTOCAST: Status = Unsupported("precision is chosen by fp16 and bf16");
const PIPELINE: Status = Unsupported("pipeline parallelism");
const TENSOR: Status = Unsupported("tensor parallelism");
const EXPERT: Status = Unsupported("expert parallelism");
const HYBRID: Status = Unsupported("training and generating by turns");
const NEBULA: Status = Unsupported("Nebula is a service of Azure");
const SERVICE: Status = Unsupported("use tensorboard, csv_monitor or metrics.jsonl");
const TUNER: Status = Unsupported("there is no autotuner");
const ELASTIC: Status = Unsupported("the number of ranks is chosen at the start");
const DATA: Status = Unsupported("data efficiency (curricula, random-LTD)");
const CURRICULUM: Status = Unsupported("curriculum learning");
const DROP: Status = Unsupported("progressive layer drop");
const EIGEN: Status = Unsupported("eigenvalues of layers");
const SPARSE: Status = Unsupported("sparse attention");
const QUANTIZED: Status = Unsupported("weight quantization by this section");
const COMPRESS: Status = Unsupported("compression while training");

const fn open(path: &'static str, keys: &'static [super::Key], others: Status) -> Section {
    Section {
        path,
        others: Some(others),
        keys,
    }
}

pub(super) const SECTIONS: &[Section] = &[
    open("amp", &[key("enabled", BOOL, "false", APEX)], APEX),
    section(
        "torch_autocast",
        &[
            key("enabled", BOOL, "false", AUTOCAST),
            key("dtype", TEXT, "null", AUTOCAST),
            key("lower_precision_safe_modules", Kind::List, "null", AUTOCAST),
        ],
    ),
    section(
        "pipeline",
        &[
            key("stages", Kind::Any, r#""auto""#, PIPELINE),
            key("partition", TEXT, r#""best""#, PIPELINE),
            key("seed_layers", BOOL, "false", PIPELINE),
            key("activation_checkpoint_interval", INT, "0", PIPELINE),
            key("pipe_partitioned", BOOL, "true", PIPELINE),
            key("grad_partitioned", BOOL, "true", PIPELINE),
            key("use_reentrant", BOOL, "true", PIPELINE),
        ],
    ),
    section(
        "tensor_parallel",
        &[
            key("autotp_size", INT, "0", TENSOR),
            key("tp_overlap_comm", BOOL, "false", TENSOR),
            key("preset_model", TEXT, "null", TENSOR),
            key("partition_config", Kind::Any, "null", TENSOR),
            key("dtype", TEXT, r#""fp16""#, TENSOR),
            key("keep_module_on_host", BOOL, "false", TENSOR),
            key("replace_with_kernel_inject", BOOL, "false", TENSOR),
        ],
    ),
    section(
        "tensor_parallel.tp",
        &[
            key("tp_size", COUNT, "1", TENSOR),
            key("tp_grain_size", COUNT, "1", TENSOR),
        ],
    ),
    open(
        "expert_parallel",
        &[
            key("enabled", BOOL, "false", EXPERT),
            key("autoep_size", COUNT, "1", EXPERT),
            key("expert_tensor_parallel_size", COUNT, "1", EXPERT),
            key("preset_model", TEXT, "null", EXPERT),
            key("use_grouped_mm", BOOL, "true", EXPERT),
            key("top_k", Kind::Any, r#""auto""#, EXPERT),
            key("score_func", TEXT, r#""auto""#, EXPERT),
            key("route_scale", NUMBER, "1.0", EXPERT),
        ],
        EXPERT,
    ),
    section(
        "hybrid_engine",
        &[
            key("enabled", BOOL, "false", HYBRID),
            key("max_out_tokens", COUNT, "512", HYBRID),
            key("inference_tp_size", COUNT, "1", HYBRID),
            key("release_inference_cache", BOOL, "false", HYBRID),
            key("pin_parameters", BOOL, "true", HYBRID),
            key("tp_gather_partition_size", COUNT, "8", HYBRID),
            key("enable_cuda_graph", BOOL, "false", HYBRID),
        ],
    ),
    section(
        "nebula",
        &[
            key("enabled", BOOL, "false", NEBULA),
            key("enable_nebula_load", BOOL, "true", NEBULA),
            key("nebula_load_path", TEXT, "null", NEBULA),
            key("load_path", TEXT, "null", NEBULA),
            key("persistent_storage_path", TEXT, "null", NEBULA),
            key("persistent_time_interval", INT, "100", NEBULA),
            key("num_of_version_in_retention", INT, "2", NEBULA),
        ],
    ),
    section(
        "wandb",
        &[
            key("enabled", BOOL, "false", SERVICE),
            key("group", TEXT, "null", SERVICE),
            key("team", TEXT, "null", SERVICE),
            key("project", TEXT, r#""deepspeed""#, SERVICE),
        ],
    ),
    section(
        "comet",
        &[
            key("enabled", BOOL, "false", SERVICE),
            key("samples_log_interval", INT, "100", SERVICE),
            key("project", TEXT, "null", SERVICE),
            key("workspace", TEXT, "null", SERVICE),
            key("api_key", TEXT, "null", SERVICE),
            key("experiment_name", TEXT, "null", SERVICE),
            key("experiment_key", TEXT, "null", SERVICE),
            key("online", BOOL, "null", SERVICE),
            key("mode", TEXT, "null", SERVICE),
        ],
    ),
    section(
        "autotuning",
        &[
            key("enabled", BOOL, "false", TUNER),
            key("fast", BOOL, "true", TUNER),
            key("results_dir", TEXT, "null", TUNER),
            key("exps_dir", TEXT, "null", TUNER),
            key("overwrite", BOOL, "true", TUNER),
            key("start_profile_step", INT, "3", TUNER),
            key("end_profile_step", INT, "5", TUNER),
            key("metric", TEXT, r#""throughput""#, TUNER),
            key("tuner_type", TEXT, r#""gridsearch""#, TUNER),
            key("tuner_early_stopping", INT, "5", TUNER),
            key("tuner_num_trials", INT, "50", TUNER),
            key("num_tuning_micro_batch_sizes", INT, "3", TUNER),
            key("mp_size", COUNT, "1", TUNER),
            key("max_train_batch_size", COUNT, "null", TUNER),
            key("min_train_batch_size", COUNT, "1", TUNER),
            key("max_train_micro_batch_size_per_gpu", COUNT, "1024", TUNER),
            key("min_train_micro_batch_size_per_gpu", COUNT, "1", TUNER),
            key("arg_mappings", Kind::Any, "null", TUNER),
        ],
    ),
    section(
        "elasticity",
        &[
            key("enabled", BOOL, "false", ELASTIC),
            key("max_train_batch_size", COUNT, "2000", ELASTIC),
            key("micro_batch_sizes", Kind::List, "[2,4,6]", ELASTIC),
            key("min_gpus", COUNT, "1", ELASTIC),
            key("max_gpus", COUNT, "10000", ELASTIC),
            key("min_time", INT, "0", ELASTIC),
            key("prefer_larger_batch", BOOL, "true", ELASTIC),
            key("version", NUMBER, "0.2", ELASTIC),
            key("ignore_non_elastic_batch_info", BOOL, "false", ELASTIC),
            key("num_gpus_per_node", COUNT, "1", ELASTIC),
            key("model_parallel_size", COUNT, "1", ELASTIC),
        ],
    ),
    section(
        "data_efficiency",
        &[
            key("enabled", BOOL, "false", DATA),
            key("seed", INT, "1234", DATA),
        ],
    ),
    section(
        "data_efficiency.data_sampling",
        &[
            key("enabled", BOOL, "false", DATA),
            key("num_epochs", COUNT, "1000", DATA),
            key("num_workers", INT, "0", DATA),
            key("pin_memory", BOOL, "false", DATA),
            key("curriculum_learning", Kind::Any, "null", DATA),
        ],
    ),
    section(
        "data_efficiency.data_sampling.dynamic_batching",
        &[
            key("enabled", BOOL, "false", DATA),
            key("lr_scaling_method", TEXT, r#""linear""#, DATA),
            key("min_batch_size", COUNT, "1", DATA),
            key("max_batch_size", COUNT, "null", DATA),
            key("max_tokens", COUNT, "null", DATA),
            key("sequence_picking_order", TEXT, r#""dataloader""#, DATA),
        ],
    ),
    section(
        "data_efficiency.data_routing",
        &[
            key("enabled", BOOL, "false", DATA),
            key("random_ltd", Kind::Any, "null", DATA),
        ],
    ),
    section(
        "curriculum_learning",
        &[
            key("enabled", BOOL, "false", CURRICULUM),
            key("curriculum_type", TEXT, r#""seqlen""#, CURRICULUM),
            key("min_difficulty", INT, "null", CURRICULUM),
            key("max_difficulty", INT, "null", CURRICULUM),
            key("schedule_type", TEXT, "null", CURRICULUM),
            key("schedule_config", Kind::Any, "null", CURRICULUM),
        ],
    ),
    section(
        "progressive_layer_drop",
        &[
            key("enabled", BOOL, "false", DROP),
            key("theta", NUMBER, "1.0", DROP),
            key("gamma", NUMBER, "0.001", DROP),
        ],
    ),
    section(
        "eigenvalue",
        &[
            key("enabled", BOOL, "false", EIGEN),
            key("verbose", BOOL, "false", EIGEN),
            key("max_iter", COUNT, "100", EIGEN),
            key("tol", NUMBER, "0.01", EIGEN),
            key("stability", NUMBER, "1e-6", EIGEN),
            key("gas_boundary_resolution", COUNT, "1", EIGEN),
            key("layer_name", TEXT, r#""bert.encoder.layer""#, EIGEN),
            key("layer_num", INT, "0", EIGEN),
        ],
    ),
    section(
        "sparse_attention",
        &[
            key("mode", TEXT, "null", SPARSE),
            key("block", COUNT, "16", SPARSE),
            key("different_layout_per_head", BOOL, "false", SPARSE),
            key("num_local_blocks", COUNT, "4", SPARSE),
            key("num_global_blocks", COUNT, "1", SPARSE),
            key("attention", TEXT, r#""bidirectional""#, SPARSE),
            key("horizontal_global_attention", BOOL, "false", SPARSE),
            key("num_different_global_patterns", COUNT, "1", SPARSE),
            key("num_random_blocks", INT, "0", SPARSE),
            key("local_window_blocks", Kind::List, "[4]", SPARSE),
            key("global_block_indices", Kind::List, "[0]", SPARSE),
            key("global_block_end_indices", Kind::List, "null", SPARSE),
            key("num_sliding_window_blocks", COUNT, "3", SPARSE),
        ],
    ),
    section(
        "weight_quantization",
        &[
            key("num_bits", COUNT, "8", QUANTIZED),
            key("q_type", TEXT, r#""symmetric""#, QUANTIZED),
            key("q_groups", COUNT, "1", QUANTIZED),
            key("quantized_initialization", Kind::Any, "null", QUANTIZED),
            key("post_init_quant", Kind::Any, "null", QUANTIZED),
        ],
    ),
    section(
        "compression_training.layer_reduction",
        &[
            key("enabled", BOOL, "false", COMPRESS),
            key("keep_number_layer", COUNT, "null", COMPRESS),
            key("module_name_prefix", TEXT, r#""""#, COMPRESS),
            key("teacher_layer", Kind::List, "[]", COMPRESS),
            key("other_module_name", Kind::List, "[]", COMPRESS),
        ],
    ),
    section(
        "compression_training.weight_quantization",
        &[key("different_groups", Kind::Any, "null", COMPRESS)],
    ),
    section(
        "compression_training.weight_quantization.shared_parameters",
        &[
            key("enabled", BOOL, "false", COMPRESS),
            key("quantizer_kernel", BOOL, "false", COMPRESS),
            key("schedule_offset", INT, "0", COMPRESS),
            key("quantize_groups", COUNT, "1", COMPRESS),
            key("quantize_verbose", BOOL, "false", COMPRESS),
            key("quantization_type", TEXT, r#""symmetric""#, COMPRESS),
            key("rounding", TEXT, r#""nearest""#, COMPRESS),
            key("quantize_weight_in_forward", BOOL, "false", COMPRESS),
        ],
    ),
    section(
        "compression_training.weight_quantization.shared_parameters.fp16_mixed_quantize",
        &[
            key("enabled", BOOL, "false", COMPRESS),
            key("quantize_change_ratio", NUMBER, "0.001", COMPRESS),
        ],
    ),
    section(
        "compression_training.activation_quantization",
        &[key("different_groups", Kind::Any, "null", COMPRESS)],
    ),
    section(
        "compression_training.activation_quantization.shared_parameters",
        &[
            key("enabled", BOOL, "false", COMPRESS),
            key("quantization_type", TEXT, r#""symmetric""#, COMPRESS),
            key("range_calibration", TEXT, r#""dynamic""#, COMPRESS),
            key("schedule_offset", INT, "1000", COMPRESS),
        ],
    ),
    section(
        "compression_training.sparse_pruning",
        &[key("different_groups", Kind::Any, "null", COMPRESS)],
    ),
    section(
        "compression_training.sparse_pruning.shared_parameters",
        &[
            key("enabled", BOOL, "false", COMPRESS),
            key("method", TEXT, r#""l1""#, COMPRESS),
            key("schedule_offset", INT, "1000", COMPRESS),
            key("schedule_offset_end", INT, "null", COMPRESS),
            key("schedule_offset_stride", COUNT, "1", COMPRESS),
            key("block_pattern", TEXT, r#""4x1""#, COMPRESS),
            key("dense_ratio", UNIT, "0.1", COMPRESS),
            key("excluded_modules", Kind::List, "[]", COMPRESS),
        ],
    ),
    section(
        "compression_training.row_pruning",
        &[key("different_groups", Kind::Any, "null", COMPRESS)],
    ),
    section(
        "compression_training.row_pruning.shared_parameters",
        PRUNING,
    ),
    section(
        "compression_training.head_pruning",
        &[key("different_groups", Kind::Any, "null", COMPRESS)],
    ),
    section(
        "compression_training.head_pruning.shared_parameters",
        &[
            key("enabled", BOOL, "false", COMPRESS),
            key("method", TEXT, r#""topk""#, COMPRESS),
            key("schedule_offset", INT, "1000", COMPRESS),
            key("num_heads", COUNT, "null", COMPRESS),
        ],
    ),
    section(
        "compression_training.channel_pruning",
        &[key("different_groups", Kind::Any, "null", COMPRESS)],
    ),
    section(
        "compression_training.channel_pruning.shared_parameters",
        PRUNING,
    ),
];

/// What pruning of rows and of channels share.
const PRUNING: &[super::Key] = &[
    key("enabled", BOOL, "false", COMPRESS),
    key("method", TEXT, r#""l1""#, COMPRESS),
    key("schedule_offset", INT, "1000", COMPRESS),
];
