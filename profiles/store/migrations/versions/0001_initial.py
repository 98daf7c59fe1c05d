"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "datasets",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("identity", sa.JSON(none_as_null=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_datasets")),
        sa.UniqueConstraint("digest", name=op.f("uq_datasets_digest")),
    )
    op.create_table(
        "devices",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("driver", sa.Text(), nullable=False),
        sa.Column("threads", sa.Integer(), nullable=False),
        sa.Column("versions", sa.JSON(none_as_null=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_devices")),
        sa.UniqueConstraint("digest", name=op.f("uq_devices_digest")),
    )
    op.create_table(
        "models",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("architecture", sa.Text(), nullable=False),
        sa.Column("layers", sa.Integer(), nullable=False),
        sa.Column("heads", sa.Integer(), nullable=False),
        sa.Column("kv_heads", sa.Integer(), nullable=False),
        sa.Column("head_dim", sa.Integer(), nullable=False),
        sa.Column("rope", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("weights_digest", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_models")),
        sa.UniqueConstraint("fingerprint", name=op.f("uq_models_fingerprint")),
    )
    op.create_table(
        "kernel_timings",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("device_id", sa.Integer(), nullable=False),
        sa.Column("engine", sa.Text(), nullable=False),
        sa.Column("dtype", sa.Text(), nullable=False),
        sa.Column("heads", sa.Integer(), nullable=False),
        sa.Column("kv_heads", sa.Integer(), nullable=False),
        sa.Column("head_dim", sa.Integer(), nullable=False),
        sa.Column("queries", sa.Integer(), nullable=False),
        sa.Column("keys", sa.Integer(), nullable=False),
        sa.Column("approximation", sa.Text(), nullable=False),
        sa.Column("median_ms", sa.Double(), nullable=False),
        sa.Column("q25_ms", sa.Double(), nullable=False),
        sa.Column("q75_ms", sa.Double(), nullable=False),
        sa.Column("repeats", sa.Integer(), nullable=False),
        sa.Column("selection_ms", sa.Double(), nullable=True),
        sa.Column("created", sa.String(length=20), nullable=False),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.id"], name=op.f("fk_kernel_timings_device_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_kernel_timings")),
        sa.UniqueConstraint(
            "device_id",
            "engine",
            "dtype",
            "heads",
            "kv_heads",
            "head_dim",
            "queries",
            "keys",
            "approximation",
            name=op.f("uq_kernel_timings_device_id"),
        ),
    )
    op.create_table(
        "measurements",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key_digest", sa.Text(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("conditions", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("values", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created", sa.String(length=20), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_measurements_model_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_measurements")),
        sa.UniqueConstraint("key_digest", name=op.f("uq_measurements_key_digest")),
    )
    op.create_table(
        "profile_runs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("dataset_id", sa.Integer(), nullable=False),
        sa.Column("context", sa.Integer(), nullable=False),
        sa.Column("sequences", sa.Integer(), nullable=False),
        sa.Column("dtype", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("settings", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("settings_digest", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created", sa.String(length=20), nullable=False),
        sa.Column("finished", sa.String(length=20), nullable=True),
        sa.ForeignKeyConstraint(
            ["dataset_id"], ["datasets.id"], name=op.f("fk_profile_runs_dataset_id")
        ),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_profile_runs_model_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_profile_runs")),
        sa.UniqueConstraint(
            "model_id",
            "dataset_id",
            "context",
            "sequences",
            "dtype",
            "seed",
            "settings_digest",
            name=op.f("uq_profile_runs_model_id"),
        ),
    )
    op.create_table(
        "candidate_scores",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("layer", sa.Integer(), nullable=False),
        sa.Column("head", sa.Integer(), nullable=False),
        sa.Column("approximation", sa.Text(), nullable=False),
        sa.Column("fisher", sa.Double(), nullable=False),
        sa.Column("relative_error", sa.Double(), nullable=False),
        sa.Column("mass_dropped", sa.Double(), nullable=True),
        sa.Column("positions", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"], ["profile_runs.id"], name=op.f("fk_candidate_scores_run_id")
        ),
        sa.PrimaryKeyConstraint(
            "run_id", "sequence", "layer", "head", "approximation", name=op.f("pk_candidate_scores")
        ),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "fitted",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("layer", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("array", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["profile_runs.id"], name=op.f("fk_fitted_run_id")),
        sa.PrimaryKeyConstraint("run_id", "layer", "name", name=op.f("pk_fitted")),
    )
    op.create_table(
        "head_profiles",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("layer", sa.Integer(), nullable=False),
        sa.Column("head", sa.Integer(), nullable=False),
        sa.Column("sink_mass", sa.Double(), nullable=True),
        sa.Column("sink_mass_64", sa.Double(), nullable=True),
        sa.Column("local_mass_64", sa.Double(), nullable=True),
        sa.Column("local_mass_128", sa.Double(), nullable=True),
        sa.Column("local_mass_256", sa.Double(), nullable=True),
        sa.Column("local_mass_512", sa.Double(), nullable=True),
        sa.Column("sink_local_mass", sa.Double(), nullable=True),
        sa.Column("entropy", sa.Double(), nullable=True),
        sa.Column("entropy_p10", sa.Double(), nullable=True),
        sa.Column("entropy_p90", sa.Double(), nullable=True),
        sa.Column("collision_entropy", sa.Double(), nullable=True),
        sa.Column("effective_keys", sa.Double(), nullable=True),
        sa.Column("top_block_mass_1", sa.Double(), nullable=True),
        sa.Column("top_block_mass_4", sa.Double(), nullable=True),
        sa.Column("top_block_mass_8", sa.Double(), nullable=True),
        sa.Column("vertical_mass", sa.Double(), nullable=True),
        sa.Column("slash_mass", sa.Double(), nullable=True),
        sa.Column("a_effective_rank", sa.Double(), nullable=True),
        sa.Column("a_stable_rank", sa.Double(), nullable=True),
        sa.Column("a_decay", sa.Double(), nullable=True),
        sa.Column("q_rank90", sa.Double(), nullable=True),
        sa.Column("q_rank95", sa.Double(), nullable=True),
        sa.Column("q_rank99", sa.Double(), nullable=True),
        sa.Column("k_rank90", sa.Double(), nullable=True),
        sa.Column("k_rank95", sa.Double(), nullable=True),
        sa.Column("k_rank99", sa.Double(), nullable=True),
        sa.Column("v_rank90", sa.Double(), nullable=True),
        sa.Column("v_rank95", sa.Double(), nullable=True),
        sa.Column("v_rank99", sa.Double(), nullable=True),
        sa.Column("q_pre_rank95", sa.Double(), nullable=True),
        sa.Column("k_pre_rank95", sa.Double(), nullable=True),
        sa.Column("q_effective_rank", sa.Double(), nullable=True),
        sa.Column("k_effective_rank", sa.Double(), nullable=True),
        sa.Column("v_effective_rank", sa.Double(), nullable=True),
        sa.Column("max_logit", sa.Double(), nullable=True),
        sa.Column("key_norm_ratio", sa.Double(), nullable=True),
        sa.Column("random_feature_exponent", sa.Double(), nullable=True),
        sa.Column("score_rank95", sa.Double(), nullable=True),
        sa.Column("cluster_inertia", sa.Double(), nullable=True),
        sa.Column("output_energy", sa.Double(), nullable=True),
        sa.Column("fisher_total", sa.Double(), nullable=True),
        sa.Column("value_spread", sa.Double(), nullable=True),
        sa.Column("q_spectrum", sa.LargeBinary(), nullable=True),
        sa.Column("k_spectrum", sa.LargeBinary(), nullable=True),
        sa.Column("v_spectrum", sa.LargeBinary(), nullable=True),
        sa.Column("a_spectrum", sa.LargeBinary(), nullable=True),
        sa.Column("block_heat", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(
            ["run_id"], ["profile_runs.id"], name=op.f("fk_head_profiles_run_id")
        ),
        sa.PrimaryKeyConstraint("run_id", "layer", "head", name=op.f("pk_head_profiles")),
    )
    op.create_table(
        "profile_shards",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("created", sa.String(length=20), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"], ["profile_runs.id"], name=op.f("fk_profile_shards_run_id")
        ),
        sa.PrimaryKeyConstraint("run_id", "sequence", name=op.f("pk_profile_shards")),
    )
    op.create_table(
        "score_shards",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("candidates", sa.Text(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("layer", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"], ["profile_runs.id"], name=op.f("fk_score_shards_run_id")
        ),
        sa.PrimaryKeyConstraint(
            "run_id", "candidates", "sequence", "layer", name=op.f("pk_score_shards")
        ),
    )
    op.create_table(
        "searches",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("device_id", sa.Integer(), nullable=False),
        sa.Column("budget", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("budget_digest", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("study", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("result", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("created", sa.String(length=20), nullable=False),
        sa.Column("finished", sa.String(length=20), nullable=True),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_searches_device_id")),
        sa.ForeignKeyConstraint(["run_id"], ["profile_runs.id"], name=op.f("fk_searches_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_searches")),
        sa.UniqueConstraint(
            "run_id", "device_id", "budget_digest", "seed", name=op.f("uq_searches_run_id")
        ),
    )
    op.create_table(
        "plans",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("search_id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("yaml", sa.Text(), nullable=False),
        sa.Column("feasible", sa.Boolean(), nullable=False),
        sa.Column("density", sa.Double(), nullable=True),
        sa.Column("kl_per_token", sa.Double(), nullable=True),
        sa.Column("perplexity", sa.Double(), nullable=True),
        sa.Column("perplexity_dense", sa.Double(), nullable=True),
        sa.Column("latency_ms", sa.Double(), nullable=True),
        sa.Column("latency_dense_ms", sa.Double(), nullable=True),
        sa.Column("kv_bytes", sa.Double(), nullable=True),
        sa.Column("induction_accuracy", sa.Double(), nullable=True),
        sa.Column("created", sa.String(length=20), nullable=False),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name=op.f("fk_plans_search_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_plans")),
        sa.UniqueConstraint("search_id", "digest", name=op.f("uq_plans_search_id")),
    )


def downgrade() -> None:
    op.drop_table("plans")
    op.drop_table("searches")
    op.drop_table("score_shards")
    op.drop_table("profile_shards")
    op.drop_table("head_profiles")
    op.drop_table("fitted")
    op.drop_table("candidate_scores")
    op.drop_table("profile_runs")
    op.drop_table("measurements")
    op.drop_table("kernel_timings")
    op.drop_table("models")
    op.drop_table("devices")
    op.drop_table("datasets")
