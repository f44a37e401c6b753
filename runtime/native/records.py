"""The structures that Python fills and compiled code reads: of an operation, a token, a task of attention, the whole run.

Every field is eight bytes, so that a NumPy record and the compiled code agree on offsets by position alone. Knows names
and positions, nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pocketlm.runtime.native.sizes import ALL_TILES

# an operation of the program; pointers are addresses, strides are bytes a token, everything else counts
OPERATION = np.dtype([
    ("kind", "i8"),
    ("barrier", "i8"),       # 1: the next operation may not begin before all threads have ended this one
    ("tail", "i8"),          # 1: only the tokens whose logits are wanted
    ("x", "i8"), ("x_stride", "i8"),
    ("out", "i8"), ("out_stride", "i8"),
    ("y", "i8"), ("y_stride", "i8"),   # GATE: what is multiplied
    ("n", "i8"),             # PREPARE, EMBED, EACH: columns; NORM, GATE: of a group; ROTATE: of a head; MATRIX: rows;
                             # CONVOLVE: of B, of C, of z, of the result
    ("weight", "i8"),        # PREPARE, NORM, STORE: the norm's weight, of the queries; EMBED, MATRIX: the tiled matrix;
                             # CONVOLVE: float32 [taps, n]
    ("bias", "i8"),          # float32, filled up with zeros to whole groups; always there
    ("weight_stride", "i8"),  # NORM, STORE, GATE: from a group's weight and bias to the next one's; 0 where they share it
    ("floats", "i8"),        # PREPARE: 1: a product reads the values that are not rounded
    ("source", "i8"),        # PREPARE: 0 as it is, 1 RMSNorm, 2 LayerNorm, 3 parts of attention; NORM, STORE: 1, 2; EACH
    ("epsilon", "f4"), ("factor", "f4"),     # factor: of what MATRIX adds, of EACH, GATE
    ("n_groups", "i8"),      # MATRIX, EMBED: of 16 rows in the matrix; NORM, ROTATE, GATE: vectors in a row
    ("n_blocks", "i8"),
    ("row", "i8"),           # EMBED: address of FMT_row
    ("add", "i8"),           # EMBED, MATRIX, NORM: 1: out += …
    ("row_is", "i8"),        # EMBED: 0: the token's id, 1: its position, 2: the id of the token before
    # MATRIX: addresses of the kernels for tiles of so many tokens, 0 where the level has none
    *((f"product{tokens}", "i8") for tokens in ALL_TILES),
    ("chunk", "i8"),         # MATRIX: groups a task; CONVOLVE: of 16 columns
    ("taps", "i8"),          # CONVOLVE
    ("activation", "i8"),    # MATRIX, EACH: 0 none, or 1 + its place in sizes.ACTIVATIONS
    ("up", "i8"), ("up_groups", "i8"), ("up_first", "i8"),   # gated: up != 0, and its first group
    ("up_blocks", "i8"), ("up_bias", "i8"),
    *((f"up_product{tokens}", "i8") for tokens in ALL_TILES),
    ("layer", "i8"),         # STORE, ATTEND, CONVOLVE: which part of a token's cache
    ("key_weight", "i8"),    # STORE: the weight of the keys' norm
    ("rope", "i8"), ("rope_half", "i8"), ("rope_interleaved", "i8"),   # ROTATE, STORE: cos and sin; half 0: none
    # ATTEND, and what joins its results
    ("window", "i8"),        # 0: all
    ("slopes", "i8"),        # ALiBi, float32 a head; 0: none
    ("sinks", "i8"),         # float32 a head; 0: none
    ("query_scale", "f4"), ("softcap", "f4"),   # softcap 0: none
    # experts; n_groups, n_blocks: of one of them, weight_stride of EXPERTS: from one's bias to the next
    ("n_experts", "i8"), ("n_used", "i8"),      # how many there are, how many a token goes to
    ("normalised", "i8"),    # ROUTE: 1: weights are divided by their sum
    ("slot_stride", "i8"),   # GATHER: from the row for a token's first expert to that for its second; 0: one for all
    ("x_bytes", "i8"),       # GATHER, EXPERTS: of a pair's activations
    ("tile", "i8"),          # EXPERTS: address of FMT_tile where weights are in the file's order, or 0
    ("expert_bytes", "i8"), ("group_bytes", "i8"),  # EXPERTS: of an expert, of 16 of its rows, in the file
])  # fmt: skip

# what all operations of a run share; fields that threads write have cache lines of their own
RUN = np.dtype([
    ("epoch", "i8"), ("pad0", "i8", 7),       # counts runs; -1: the threads end
    ("arrived", "i8"), ("pad1", "i8", 7),     # how often a thread has reached a barrier of this run
    ("lost", "i8"), ("pad2", "i8", 7),        # for how long threads have waited for others longer than work can explain
    ("took", "i8"),                           # how long the last run took, by the same clock
    ("n_threads", "i8"),                      # that take part in a run; the others have nothing to do with it
    ("begun", "i8"),                          # 1 while a run has begun and thread 0 has not ended it
    ("give_way", "i8"),                       # address of sched_yield
    ("advise", "i8"),                         # address of madvise, or 0
    ("workers", "i8"),                        # WORKER records, one a thread
    ("program", "i8"), ("n_operations", "i8"), ("counters", "i8"),   # counters: run_loop.py
    ("tokens", "i8"), ("n_tokens", "i8"),     # TOKEN records
    ("rows", "i8"), ("n_logits", "i8"),       # int64: the tokens whose logits are wanted
    ("samplers", "i8"),                       # int64: of each of these the address of a SAMPLER, or 0; 0: of none
    ("most", "i8"), ("n_passes", "i8"),       # passes of a run: how many at most, how many are done
    ("another", "i8"),                        # 1: a pass follows
    ("wanted", "i8"),                         # address of an int64 that is 1 when somebody else wants a pass, or 0
    ("entries", "i8"), ("n_entries", "i8"),   # ENTRY records, each with n_kv_head tasks
    ("activations", "i8"), ("activation_stride", "i8"),   # prepared activations of a block of tokens
    ("scratch", "i8"), ("scratch_stride", "i8"),          # a thread's own memory, see stages.py
    # where its parts begin, in bytes
    ("products_at", "i8"), ("rows_at", "i8"), ("queries_at", "i8"), ("scores_at", "i8"), ("mixed_at", "i8"),
    ("partials", "i8"),                       # attention's results: slots, each of n_head of them
    ("n_head", "i8"), ("n_kv_head", "i8"), ("head_dim", "i8"), ("padded_dim", "i8"),
    # tokens sorted by expert: an int64 an expert, PAIR records, GROUP records and how many; where experts are tiled
    ("counts", "i8"), ("pairs", "i8"), ("groups", "i8"), ("n_chosen", "i8"), ("tiled_at", "i8"),
])  # fmt: skip

# a token of a pass: which it is, where it stands in its text, and the cache of that text
TOKEN = np.dtype([
    ("id", "i8"), ("position", "i8"),
    ("cache", "i8"), ("layers", "i8"),        # addresses of its cache and of the LAYER records about it
    ("slot", "i8"), ("n_partials", "i8"),     # its results of attention: n_partials slots from `slot` on
    ("before", "i8"),                         # the id of the token before; -1: none
    ("columns", "i8"),                        # address of the first convolution's
])  # fmt: skip

# a layer of a cache. offset: bytes from the cache's address to its keys, or from the first convolution's columns to its own;
# rows: how many positions it keeps, position p in row p % rows; stride: bytes from SPAN of its rows to the next SPAN
LAYER = np.dtype([("offset", "i8"), ("rows", "i8"), ("stride", "i8")])
# a token and one of its experts: the slot-th of them. The pairs of this expert are [first, last), and their activations begin
# behind those of `place` pairs. GROUP: the same of an expert
PAIR = np.dtype([("token", "i8"), ("slot", "i8"), ("first", "i8"), ("last", "i8"), ("place", "i8")])
GROUP = np.dtype([("expert", "i8"), ("first", "i8"), ("last", "i8"), ("place", "i8")])

# what one task of attention does, for each key-value head: n_tokens neighbouring tokens of a text, from `token` on, meet spans
# of positions. apart > 0: every apart-th span from `first` on, other entries have the others, and each span's result has a slot
# of its own; so a window's spans are shared out evenly, too. apart 0: all spans, joined in the token's slot
ENTRY = np.dtype([
    ("token", "i8"), ("n_tokens", "i8"), ("first", "i8"), ("apart", "i8"),
])  # fmt: skip

# a query that a thread takes through spans of positions
QUERY = np.dtype([
    ("position", "i8"), ("oldest", "i8"),     # it sees positions from the oldest to its own
    ("result", "i8"),                         # an address
    ("slope", "f4"), ("softcap", "f4"),
    ("scale", "f4"), ("pad", "f4"),           # of its integers
    ("factors", "f4", 8),                     # of its weights' integers, in each block of a span
])  # fmt: skip

# a thread. state: 1 while it sleeps in Python; go, seen: the last run that it is to take part in, and that it took part in;
# wake: 1 if Python has to wake it
WORKER = np.dtype([("state", "i8"), ("go", "i8"), ("seen", "i8"), ("wake", "i8"), ("pad", "i8", 4)])

# how tokens are drawn, and memory for that; pairs of f4 keep the fields aligned to eight bytes
SAMPLER = np.dtype([
    ("n_vocab", "i8"), ("k", "i8"),           # k: of top-k, 0: off; 1: greedy
    ("edits", "i8"), ("logprobs", "i8"),      # 1: there are biases or penalties; 1: `logit` and `sum` are wanted
    ("last_n", "i8"),                         # how many of the last tokens are penalised
    ("repeat", "f4"), ("presence", "f4"), ("frequency", "f4"), ("unused", "f4"),
    ("exempt", "i8"), ("n_exempt", "i8"),     # int64: ids that no penalty touches
    ("bias_ids", "i8"), ("biases", "i8"), ("n_bias", "i8"),  # int64, float32
    ("top_p", "f8"), ("min_p", "f8"), ("scale", "f8"),  # 1: off; -log of min-p, infinite: off; 1 / temperature
    ("reach", "f8"),                          # top-p and min-p keep no logit further below the largest; infinite: off
    ("allowed", "i8"), ("n_allowed", "i8"),   # int64 ids that may be drawn; n_allowed FORBIDDEN: 1 byte an id, 1 if not; ALL
    ("masked", "i8"),                         # float32: the logits, -inf for the others
    ("saved", "i8"),                          # float32: what edits have changed
    ("chunks", "i8"),                         # float32: the largest of every sizes.CHUNK logits, then -inf
    ("values", "i8"), ("ids", "i8"),          # float32, int32: candidates
    ("sorted", "i8"), ("sorted_ids", "i8"),   # as much memory again, to sort them
    ("columns", "i8"),                        # float64: sums of weights, see softmax.py
    ("logit", "f8"), ("sum", "f8"),           # results, see draw.py
    # for what is drawn inside a run: int32, the text so far, with room for more; float64, a random number a token
    ("text", "i8"), ("n_text", "i8"), ("uniforms", "i8"),
    ("ends", "i8"), ("n_ends", "i8"),         # int64: tokens after which none is drawn
    ("drawn", "i8"), ("logits", "i8"), ("sums", "i8"),  # of each pass, int64 and float64: the token, and the two results
])  # fmt: skip


def offset(dtype: np.dtype, name: str) -> int:
    fields: Any = dtype.fields
    return fields[name][1]
