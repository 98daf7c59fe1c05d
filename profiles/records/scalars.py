"""The numbers that describe one head: their names, once.

From this list come the columns of the table of head profiles, what `attnplan query heads` offers,
and the keys of the dictionary that a head's profile carries. A mean is over queries, weighted
equally; the far keys of a query are those past the first 4 and before its last 128.
"""

from __future__ import annotations

SCALARS: tuple[tuple[str, str], ...] = (
    ("sink_mass", "mean attention mass on the first 4 keys"),
    ("sink_mass_64", "mean attention mass on the first 64 keys"),
    ("local_mass_64", "mean attention mass on the last 64 keys up to the query"),
    ("local_mass_128", "mean attention mass on the last 128 keys up to the query"),
    ("local_mass_256", "mean attention mass on the last 256 keys up to the query"),
    ("local_mass_512", "mean attention mass on the last 512 keys up to the query"),
    ("sink_local_mass", "mean attention mass on the first 4 and the last 128 keys together"),
    ("entropy", "mean Shannon entropy of a query's attention, nats"),
    ("entropy_p10", "10th percentile over queries of the Shannon entropy, nats"),
    ("entropy_p90", "90th percentile over queries of the Shannon entropy, nats"),
    ("collision_entropy", "mean of -log sum p^2, nats"),
    ("effective_keys", "mean of 1 / sum p^2: how many keys a query effectively reads"),
    ("top_block_mass_1", "mean mass on the best far key block of each query"),
    ("top_block_mass_4", "mean mass on the best 4 far key blocks of each query"),
    ("top_block_mass_8", "mean mass on the best 8 far key blocks of each query"),
    ("vertical_mass", "share of the far mass in the best 32 columns of the block heat map"),
    ("slash_mass", "share of the far mass in the best diagonals of the block heat map"),
    ("a_effective_rank", "exponential of the entropy of the spectrum of the attention matrix"),
    ("a_stable_rank", "squared Frobenius norm over squared spectral norm of the attention matrix"),
    ("a_decay", "exponent of the power law fitted to its singular values; larger decays faster"),
    ("q_rank90", "dimensions that hold 90 % of the energy of the queries, after RoPE"),
    ("q_rank95", "dimensions that hold 95 % of the energy of the queries, after RoPE"),
    ("q_rank99", "dimensions that hold 99 % of the energy of the queries, after RoPE"),
    ("k_rank90", "dimensions that hold 90 % of the energy of the keys, after RoPE"),
    ("k_rank95", "dimensions that hold 95 % of the energy of the keys, after RoPE"),
    ("k_rank99", "dimensions that hold 99 % of the energy of the keys, after RoPE"),
    ("v_rank90", "dimensions that hold 90 % of the energy of the values"),
    ("v_rank95", "dimensions that hold 95 % of the energy of the values"),
    ("v_rank99", "dimensions that hold 99 % of the energy of the values"),
    ("q_pre_rank95", "dimensions that hold 95 % of the energy of the queries, before RoPE"),
    ("k_pre_rank95", "dimensions that hold 95 % of the energy of the keys, before RoPE"),
    ("q_effective_rank", "exponential of the entropy of the energy spectrum of the queries"),
    ("k_effective_rank", "exponential of the entropy of the energy spectrum of the keys"),
    ("v_effective_rank", "exponential of the entropy of the energy spectrum of the values"),
    ("max_logit", "largest score before the softmax: a hazard for exponentials in low precision"),
    ("key_norm_ratio", "largest key norm over the median one"),
    ("random_feature_exponent", "E|q' + k'|^2 after centring: log-variance of random features"),
    ("score_rank95", "dimensions that hold 95 % of the energy of the balanced scores"),
    (
        "cluster_inertia",
        "k-means inertia of the keys over their variance; 0 is clustered",
    ),
    ("output_energy", "mean squared norm of the head's output"),
    ("fisher_total", "E[(g . o)^2]: how much the loss feels the head's whole output"),
    ("value_spread", "mean squared distance of the values from their mean over their energy"),
)
"""(name, description) of every scalar statistic of a head."""

SCALAR_NAMES: tuple[str, ...] = tuple(name for name, _ in SCALARS)

ARRAYS: tuple[tuple[str, str], ...] = (
    ("q_spectrum", "eigenvalues of the Gram matrix of the queries after RoPE, descending"),
    ("k_spectrum", "eigenvalues of the Gram matrix of the keys after RoPE, descending"),
    ("v_spectrum", "eigenvalues of the Gram matrix of the values, descending"),
    ("a_spectrum", "leading singular values of the attention matrix, descending"),
    ("block_heat", "attention mass of query blocks (rows) on key blocks (columns)"),
)
"""(name, description) of every array statistic of a head."""

ARRAY_NAMES: tuple[str, ...] = tuple(name for name, _ in ARRAYS)
