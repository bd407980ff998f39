//! The keys outside `zero_optimization` that mean something here, and those that concern other machines.

use super::Status::{NoMeaning, Unsupported};
use super::{
    BOOL, COUNT, INT, Kind, NOT_NEGATIVE, POSITIVE, Section, Status, TEXT, YES, key, section,
};

const ALWAYS: Status = NoMeaning("it is always so");
const ONE_OPTIMIZER: Status = NoMeaning("there is one implementation of each optimizer");
const IN_ORDER: Status = NoMeaning("gradients are summed in f32, in rank order, and divided once");
const EVERY_LAYER: Status = NoMeaning("the input of every layer is kept");
const IN_MEMORY: Status = NoMeaning("activations are in the memory of the CPU");
const CUDA: Status = NoMeaning("it concerns GPUs");
const POOLED: Status = NoMeaning("activations come from a pool that does not fragment");
const NO_MODEL_PARALLEL: Status = NoMeaning("there are no tensor-parallel ranks to share with");
const NO_SEQUENCE_PARALLEL: Status = NoMeaning("there is no sequence parallelism");
const COMPILER: Status = NoMeaning("the model is compiled Rust; there is no graph compiler");
const WRITER: Status = NoMeaning("checkpoints are written in parallel, straight from the shards");
const ONE_LEVEL: Status = NoMeaning("the table has the layers of the model, and all of them");
const MASTERS: Status = Unsupported("masters and their gradients are f32");

pub(super) const SECTIONS: &[Section] = &[
    section(
        "",
        &[
            key("train_batch_size", COUNT, "null", YES),
            key("train_micro_batch_size_per_gpu", COUNT, "null", YES),
            key("gradient_accumulation_steps", COUNT, "null", YES),
            key(
                "managed_gradient_accumulation",
                BOOL,
                "true",
                Unsupported("the engine counts the micro batches"),
            ),
            key("gradient_clipping", NOT_NEGATIVE, "1.0", YES),
            key("prescale_gradients", BOOL, "false", IN_ORDER),
            key("gradient_predivide_factor", POSITIVE, "1.0", IN_ORDER),
            key(
                "gradient_allreduce_op",
                Kind::Choice(&["mean", "sum"]),
                r#""mean""#,
                YES,
            ),
            key("communication_data_type", Kind::Float, "null", YES),
            // Accelerate's word for what DeepSpeed has no key for; DeepSpeed passes over it.
            key("sync_each_batch", BOOL, "true", YES),
            key(
                "seq_parallel_communication_data_type",
                Kind::Float,
                r#""fp32""#,
                NO_SEQUENCE_PARALLEL,
            ),
            key(
                "sequence_parallel_size",
                COUNT,
                "1",
                Unsupported("there is no sequence parallelism yet"),
            ),
            key(
                "sparse_gradients",
                BOOL,
                "false",
                Unsupported("gradients of embeddings are dense"),
            ),
            key(
                "disable_allgather",
                BOOL,
                "false",
                NoMeaning("weights are gathered where the stage asks for it"),
            ),
            key("steps_per_print", COUNT, "null", YES),
            key("wall_clock_breakdown", BOOL, "false", YES),
            key(
                "memory_breakdown",
                BOOL,
                "false",
                NoMeaning("the plan and the report of a run have the memory by category"),
            ),
            key("dump_state", BOOL, "false", YES),
            key(
                "log_level",
                TEXT,
                "null",
                NoMeaning("what is printed is chosen on the command line"),
            ),
            key(
                "dataloader_drop_last",
                BOOL,
                "false",
                NoMeaning("every batch is full: sequences are packed"),
            ),
            key("graph_harvesting", BOOL, "false", CUDA),
            key(
                "zero_allow_untested_optimizer",
                BOOL,
                "false",
                NoMeaning("every optimizer is tested at every stage"),
            ),
            key("zero_force_ds_cpu_optimizer", BOOL, "true", ONE_OPTIMIZER),
            key(
                "use_data_before_expert_parallelism",
                BOOL,
                "false",
                Unsupported("there is no expert parallelism yet"),
            ),
        ],
    ),
    section(
        "optimizer",
        &[
            key("type", TEXT, "null", YES),
            key("legacy_fusion", BOOL, "false", ONE_OPTIMIZER),
        ],
    ),
    section("scheduler", &[key("type", TEXT, "null", YES)]),
    section(
        "fp16",
        &[
            key("enabled", BOOL, "false", YES),
            key(
                "auto_cast",
                BOOL,
                "false",
                NoMeaning("the inputs are token numbers"),
            ),
            key("loss_scale", NOT_NEGATIVE, "0", YES),
            key("initial_scale_power", INT, "16", YES),
            key("loss_scale_window", COUNT, "1000", YES),
            key("hysteresis", COUNT, "2", YES),
            key("consecutive_hysteresis", BOOL, "false", YES),
            key("min_loss_scale", POSITIVE, "1", YES),
            key("fp16_master_weights_and_grads", BOOL, "false", MASTERS),
        ],
    ),
    section(
        "bf16",
        &[
            key("enabled", BOOL, "false", YES),
            key("immediate_grad_update", BOOL, "false", ALWAYS),
            key("check_grad_overflow", BOOL, "true", ALWAYS),
            key("bf16_master_weights_and_grads", BOOL, "false", MASTERS),
            key("bf16_optimizer_states", BOOL, "false", YES),
        ],
    ),
    section(
        "data_types",
        &[
            key("grad_accum_dtype", Kind::Float, "null", YES),
            key(
                "param_dtype",
                Kind::Float,
                "null",
                Unsupported("the type of parameters follows fp16 and bf16"),
            ),
            key(
                "buffer_dtype",
                Kind::Float,
                "null",
                Unsupported("models have no buffers"),
            ),
        ],
    ),
    section(
        "aio",
        &[
            key("block_size", COUNT, "1048576", YES),
            key("queue_depth", COUNT, "8", YES),
            key("intra_op_parallelism", COUNT, "1", YES),
            key("single_submit", BOOL, "false", YES),
            key("overlap_events", BOOL, "true", YES),
            key("use_gds", BOOL, "false", CUDA),
        ],
    ),
    section(
        "activation_checkpointing",
        &[
            key("partition_activations", BOOL, "false", NO_MODEL_PARALLEL),
            key("number_checkpoints", COUNT, "null", EVERY_LAYER),
            key("contiguous_memory_optimization", BOOL, "false", POOLED),
            key("cpu_checkpointing", BOOL, "false", IN_MEMORY),
            // Not DeepSpeed's: the folder of the swap files in which inputs rest until the backward pass.
            key("nvme_path", TEXT, "null", YES),
            key("synchronize_checkpoint_boundary", BOOL, "false", CUDA),
            key(
                "profile",
                BOOL,
                "false",
                NoMeaning("wall_clock_breakdown has the times of recomputation"),
            ),
        ],
    ),
    section(
        "checkpoint",
        &[
            key(
                "tag_validation",
                Kind::Choice(&["ignore", "warn", "fail"]),
                r#""warn""#,
                NoMeaning("ranks that name a checkpoint differently are refused"),
            ),
            key(
                "load_universal",
                BOOL,
                "false",
                NoMeaning("every checkpoint loads at any number of ranks"),
            ),
            key(
                "use_node_local_storage",
                BOOL,
                "false",
                Unsupported("all ranks write to one folder"),
            ),
            key("checkpoint_serialization", BOOL, "true", WRITER),
        ],
    ),
    section(
        "checkpoint.parallel_write",
        &[key("pipeline_stage", BOOL, "false", WRITER)],
    ),
    section(
        "checkpoint.writer",
        &[
            key(
                "type",
                Kind::Choice(&["fast", "python", "mock"]),
                r#""fast""#,
                WRITER,
            ),
            key("decoupled", BOOL, "false", YES),
            key("io_buffer_size", COUNT, "67108864", WRITER),
            key("io_buffer_double", BOOL, "true", WRITER),
            key("show_statistics", BOOL, "false", WRITER),
            key(
                "data_parallel",
                Kind::Choice(&["replica", "socket", "machine"]),
                "null",
                WRITER,
            ),
            key("io_multiplier", COUNT, "1", WRITER),
        ],
    ),
    section(
        "flops_profiler",
        &[
            key("enabled", BOOL, "false", YES),
            key("recompute_fwd_factor", NOT_NEGATIVE, "0.0", YES),
            key("profile_step", COUNT, "1", YES),
            key("module_depth", Kind::Signed, "-1", ONE_LEVEL),
            key("top_modules", COUNT, "1", ONE_LEVEL),
            key("detailed", BOOL, "true", YES),
            key("output_file", TEXT, "null", YES),
        ],
    ),
    section(
        "tensorboard",
        &[
            key("enabled", BOOL, "false", YES),
            key("output_path", TEXT, r#""""#, YES),
            key("job_name", TEXT, r#""DeepSpeedJobName""#, YES),
        ],
    ),
    section(
        "csv_monitor",
        &[
            key("enabled", BOOL, "false", YES),
            key("output_path", TEXT, r#""""#, YES),
            key("job_name", TEXT, r#""DeepSpeedJobName""#, YES),
        ],
    ),
    section(
        "comms_logger",
        &[
            key("enabled", BOOL, "false", YES),
            key("verbose", BOOL, "false", YES),
            key("prof_all", BOOL, "true", YES),
            key(
                "debug",
                BOOL,
                "false",
                NoMeaning("collectives have no Python callers to name"),
            ),
            key("prof_ops", Kind::List, "[]", YES),
        ],
    ),
    section(
        "timers.throughput",
        &[
            key("enabled", BOOL, "true", ALWAYS),
            key("synchronized", BOOL, "true", ALWAYS),
        ],
    ),
    Section {
        path: "compile",
        others: Some(COMPILER),
        keys: &[
            key("deepcompile", BOOL, "false", COMPILER),
            key("passes", Kind::List, "null", COMPILER),
            key("free_activation", BOOL, "false", COMPILER),
            key("free_activation_threshold", INT, "10485760", COMPILER),
            key("offload_activation", BOOL, "false", COMPILER),
            key("offload_activation_pin_memory", BOOL, "true", COMPILER),
            key("offload_opt_states", BOOL, "false", COMPILER),
            key("offload_parameters", BOOL, "false", COMPILER),
            key("double_buffer", BOOL, "true", COMPILER),
            key("symmetric_memory", BOOL, "false", COMPILER),
            key("debug_log", BOOL, "false", COMPILER),
            key("sync_before_reduce", BOOL, "false", COMPILER),
            key("sync_after_reduce", BOOL, "false", COMPILER),
            key("sync_before_allgather", BOOL, "false", COMPILER),
            key("sync_after_allgather", BOOL, "false", COMPILER),
            key("keep_int_input_tensors", BOOL, "true", COMPILER),
            key("keep_all_input_tensors", BOOL, "false", COMPILER),
        ],
    },
];
