"""Codes of findings about files: what readers, sanity checks, writers and training noticed."""

from __future__ import annotations

from typing import Final

from lora_analysis.finding.templates import Code

FILE_CODES: Final[dict[str, Code]] = {
    "file-note": Code("limit", "file", "{text}"),
    "unchanged-weights": Code(
        "limit",
        "modules",
        "{count} of {of} weights are unchanged from {base}, so their update is zero: {modules}.",
    ),
    "weights-without-counterpart": Code(
        "limit",
        "modules",
        "{count} of {of} weights are left out, since {base} has no counterpart: {modules}. The "
        "first: {reason}",
    ),
    "other-tensors-differ": Code(
        "limit",
        "modules",
        "{count} tensors that are not matrices (biases, norms, stacks) differ too and are not part "
        "of the update: {tensors}. Largest relative change: {largest:number}.",
    ),
    "missing-weights": Code(
        "limit",
        "modules",
        "{count:plural weight} of {base} have no counterpart in the fine-tune and are left out: "
        "{modules}. The first: {reason}",
    ),
    "difference-of-quantized": Code(
        "limit",
        "modules",
        "One of the two models is quantized ({storage}) in {count} of {of} weights: their update "
        "contains its rounding.",
    ),
    "difference-of-types": Code(
        "limit",
        "modules",
        "{count} of {of} weights are stored as {dtype}, in the base as {base_dtype}: rounding to "
        "{coarse} alone changes a weight by about {rounding:number} ‖W‖. A ‖ΔW‖/‖W‖ of that size "
        "is not training.",
    ),
    "factors-stored-transposed": Code(
        "limit",
        "modules",
        "The factors are stored transposed, A as (d_in, r) and B as (r, d_out), and were "
        "transposed back. If B was named first, swap the two patterns.",
    ),
    "names-matched": Code(
        "limit",
        "module names",
        "{count} of {total} modules have different names in different files and were matched: "
        "'{module}' is shown as '{shown}'.",
    ),
    "names-prefix": Code(
        "limit",
        "module names",
        "module names differ by a prefix ({prefixes}); it was ignored, because counts and shapes "
        "of all modules agree without it.",
    ),
    "names-ambiguous": Code(
        "limit",
        "module names",
        "several prefixes ({prefixes}) precede the same names and shapes, so these "
        "modules were not matched. Pass prefix= to choose one (command line: --prefix OLD=NEW).",
    ),
    "names-hidden": Code(
        "limit",
        "module names",
        "the given prefix maps other modules to the names of these, which were left out: "
        "{modules}.",
    ),
    "zero-a": Code(
        "damage",
        "numbers",
        "A is zero in {count} of {total} modules ({modules}). In linear layers A starts random, so "
        "these tensors were lost; ΔW of these modules is zero in this file.",
    ),
    "enlarged-entry": Code(
        "damage",
        "numbers",
        "{role} of '{module}' holds {value}, {ratio} times the rms of its other entries: a flipped "
        "bit or another error in the file. Affected: {modules} ({count} of {total} modules). Small "
        "errors are not detected; compare the file's sha256 with the original's.",
    ),
    "single-entry": Code(
        "damage",
        "numbers",
        "{role} of '{module}' is zero except for one entry of {value}: a flipped bit or another "
        "error in the file. Affected: {modules} ({count} of {total} modules).",
    ),
    "large-values": Code(
        "damage",
        "numbers",
        "{role} of '{module}' holds {value} (limit 10,000): the training diverged or the file is "
        "damaged. Affected: {modules} ({count} of {total} modules).",
    ),
    "tiny-values": Code(
        "damage",
        "numbers",
        "{role} of '{module}' holds no entry above {value}; trained factors are not so small: the "
        "file is damaged or its type is wrong. Affected: {modules} ({count} of {total} modules).",
    ),
    "large-scale": Code(
        "damage",
        "numbers",
        "The scale of '{module}' is {value} (limit 10,000): its alpha may be damaged. Affected: "
        "{modules} ({count} of {total} modules).",
    ),
    "norm-outlier": Code(
        "damage",
        "numbers",
        "{quantity} of '{module}' is {value}, a factor of {ratio} outside the {bound} over the "
        "other {others} modules {scope} (limit {limit}): the training diverged there or the file "
        "is damaged. Affected: {modules} ({count} of {total} modules).",
    ),
    "unusual-norm": Code(
        "limit",
        "numbers",
        "{quantity} of '{module}' is {value}, a factor of {ratio} outside the {bound} over the "
        "other {others} modules {scope}; real adapters stay within a factor of 3. Affected: "
        "{modules} ({count} of {total} modules).",
    ),
    "file-hole": Code(
        "damage",
        "numbers",
        "{role} of '{module}' has {bytes:,} bytes of zeros that start and end on 512-byte blocks "
        "of the file or on tensor ends: a hole in the file, as an interrupted copy or download "
        "leaves it. Affected: {modules} ({count} of {total} modules).",
    ),
    "zeros-in-a-row": Code(
        "limit",
        "numbers",
        "{role} of '{module}' has {bytes:,} bytes of zeros in a row. Harmless causes are embedding "
        "rows that were never seen, a padded vocabulary, pruned or dead units, and block-diagonal "
        "factors of fused projections. Affected: {modules} ({count} of {total} modules).",
    ),
    "scattered-zeros": Code(
        "limit",
        "numbers",
        "{share:.0%} of the entries of {role} of '{module}' are zero: a sparse method, a "
        "block-diagonal factor, or underflow in {dtype}. Affected: {modules} ({count} of {total} "
        "modules).",
    ),
    "no-gradient": Code(
        "limit",
        "numbers",
        "B is zero in {count} of {total} modules, in whole types or layers ({modules}): they never "
        "received a gradient, for example the last layer of a text encoder, or experts that were "
        "never routed to.",
    ),
    "zero-b": Code(
        "damage",
        "numbers",
        "B is zero in {count} of {total} modules ({modules}), while other modules of the same "
        "types and layers were trained: these tensors were probably lost. ΔW of these modules is "
        "zero in this file.",
    ),
    "twin-modules": Code(
        "damage",
        "numbers",
        "'{module}' and '{other}' have identical A and B: training does not produce this, so one "
        "overwrote the other. Affected: {modules} ({count} of {total} modules).",
    ),
    "below-precision": Code(
        "limit",
        "numbers",
        "The smallest σ of {count} of {total} modules are below storage precision: rounding to "
        "{dtype} alone may have changed those of '{module}' by {ratio:.1g} times their size.",
    ),
    "copied-a": Code(
        "artifact",
        "numbers",
        "{count} modules share their A with another (for example {modules}): a fused projection "
        "was split and its A copied. An input overlap of 1 between them is an artifact.",
    ),
    "split-qkv": Code(
        "limit",
        "modules",
        "{count} fused projections were trained as {parts} separate LoRAs (split_qkv): B is "
        "block-diagonal (seen in '{module}'). The scale is what every loader computes from the "
        "joint rank; training used {parts} times as much.",
    ),
    "fused-modules-split": Code(
        "limit", "modules", "The grouped factors of {modules} are read block by block."
    ),
    "interleaved-blocks": Code(
        "limit",
        "modules",
        "query_key_value interleaves q, k and v per head in every model that has it, so the blocks "
        "of rows that were trained are not q, k or v; they are named rows0, rows1, ...",
    ),
    "dora": Code(
        "limit",
        "method",
        "DoRA in {count} of {total} modules: ΔW is the low-rank part s·B·A; the weight in use is "
        "W + ΔW with each row or column scaled to a learned norm.",
    ),
    "dora-columns": Code(
        "limit",
        "method",
        "DoRA in {count} of {total} modules holds norms of the input columns of W + ΔW, not of its "
        "rows (first: {module}); PEFT has no such DoRA.",
    ),
    "side-tensors": Code(
        "limit",
        "file",
        "{tensors} next to the factors: {what} ({keys}).",
    ),
    "base-tensors": Code(
        "limit",
        "file",
        "{tensors} next to the factors: the base model's, not analyzed ({keys}).",
    ),
    "side-tensors-not-written": Code(
        "limit",
        "writing",
        "Not written, because the format {format} cannot store it: {tensors} next to the factors "
        "({keys}).",
    ),
    "metadata-not-written": Code(
        "limit",
        "writing",
        "Not written, because it describes a file of a different format than {format}: {entries} "
        "of metadata ({keys}).",
    ),
    "loaders-scale": Code(
        "limit",
        "writing",
        "The scale of {count} of {total} modules is not stated; 1 was written, as loaders of the "
        "source assume. The scale in training may have been different.",
    ),
    "kasa": Code(
        "limit",
        "method",
        "KaSA: ΔW is the low-rank part s·B·diag·A; the smallest r singular directions were taken "
        "out of the base weight beforehand.",
    ),
    "config-missing": Code(
        "limit",
        "config",
        "There is no {config}: neither the scale nor the initialization is stated.",
    ),
    "config-type-missing": Code(
        "limit",
        "config",
        "{config} names no peft_type; it states r or lora_alpha and is read as PEFT's LoRA.",
    ),
    "config-rank-differs": Code(
        "damage",
        "config",
        "The rank in adapter_config.json is not that of the factors for {modules} of {of} modules "
        "(first: '{first}', {stated} in the config, {rank} in the file). The ranks of the "
        "factors are used.",
    ),
    "config-targets-missing": Code(
        "limit",
        "config",
        "target_modules names {count} of {of} targets for which the file holds no factors: "
        "{targets}. Either the model has no such module, or their factors are missing.",
    ),
    "config-targets-exceeded": Code(
        "limit",
        "config",
        "{modules} of {of} modules have factors and are not in target_modules (first: '{first}'). "
        "PEFT would not load them. Do config and weights belong to the same adapter?",
    ),
    "config-targets-unchecked": Code(
        "limit", "config", "The modules of the file were not compared with target_modules: {reason}"
    ),
    "config-excluded": Code(
        "limit",
        "config",
        "{modules} of {of} modules have factors and are in exclude_modules (first: '{first}'). "
        "PEFT would not load them. Do config and weights belong to the same adapter?",
    ),
    "config-layers-differ": Code(
        "limit",
        "config",
        "The layers with factors are not those of layers_to_transform. Without factors: "
        "[{missing}]; not in the config: [{beyond}].",
    ),
    "layers-missing": Code(
        "limit",
        "config",
        "{modules} modules are missing between layers that have them (first: '{first}'; layers "
        "{layers}). Either these layers were excluded from training, or their factors were lost.",
    ),
    "config-saved-missing": Code(
        "limit",
        "config",
        "modules_to_save names modules of which the file holds no tensor: {modules}. Either the "
        "model has no such module, or it was not saved.",
    ),
    "config-biases-missing": Code(
        "limit",
        "config",
        "The config says that biases were trained (bias = '{bias}'), and the file holds none.",
    ),
    "scale-unknown": Code(
        "limit",
        "scale",
        "The scale of {modules} of {of} modules is not known ({reason}): spectra are in units of "
        "the scale. Pass scale= or alpha= (command line: --scale, --alpha) to set it.",
    ),
    "alpha-zero": Code(
        "limit",
        "scale",
        "lora_alpha is 0 for {modules} of {of} modules: the factors are not applied as "
        "configured. They are analyzed as stored, in units of the scale. Pass alpha= or scale= "
        "(command line: --alpha, --scale) to set it.",
    ),
    "alora": Code("limit", "method", "aLoRA: the update acts only after the invocation tokens."),
    "mica": Code(
        "limit",
        "method",
        "MiCA: B is not trained, it holds the base weight's last left singular vectors; the "
        "output side does not show what was learned.",
    ),
    "pruned-to-rank-0": Code(
        "limit",
        "method",
        "{modules} modules were pruned to rank 0 and are left out (first: '{first}').",
    ),
    "layers-replicated": Code(
        "limit",
        "config",
        "Layers are numbered as replicated; each is compared with the base's own layer.",
    ),
    "grouped-convolutions": Code(
        "limit",
        "modules",
        "{modules} grouped convolutions (first: '{first}'): ΔW acts on all input channels, the "
        "base weight on those of its group.",
    ),
    "expert-order": Code(
        "limit",
        "experts",
        "Factors of {experts} experts are stored in one tensor ({parameters}). The columns of B "
        "are read {order}, {reason}. A wrong order gives different updates of the same size.",
    ),
    "expert-orientation-unknown": Code(
        "limit",
        "experts",
        "'{parameter}': whether A of the experts acts on the inputs is not stated (PEFT before "
        "0.19 did not order the axes); this is assumed. Compare its shape with the base's.",
    ),
    "expert-stack": Code(
        "limit",
        "experts",
        "Factors of {experts} experts are stored in one tensor each ({parameters}) and are read "
        "per expert.",
    ),
    "expert-factors-shared": Code(
        "artifact",
        "experts",
        "All {experts} experts share one factor of each projection ({parameters}): their overlap "
        "on that side is 1 by construction.",
    ),
    "empty-placeholders": Code(
        "limit",
        "modules",
        "{modules} modules have empty factors and are left out ({types}): the model has no such "
        "projection.",
    ),
    "kernel-assumed": Code(
        "limit",
        "modules",
        "AdaLoRA on {modules} convolutions (first: '{first}'): the file does not state the width "
        "of the kernels; {kernel} is assumed from the number of columns. ΔW as a matrix is exact. "
        "Pass kernel= (command line: --kernel) to set it.",
    ),
    "empty-saved-tensors": Code(
        "damage",
        "file",
        "{count} tensors of modules trained in full are empty (first: '{first}'): DeepSpeed "
        "ZeRO-3 saved them without gathering their parts. The trained values are not in the "
        "file.",
    ),
    "tensors-beside": Code(
        "limit",
        "file",
        "{count} further tensors in the file: {what} (first: '{first}'). They are not analyzed.",
    ),
    "tensors-in-full": Code(
        "limit", "file", "{count} tensors in the file are {what} (first: '{first}')."
    ),
    "side-file": Code(
        "limit",
        "file",
        "'{file}' is stored next to the adapter: modules trained in full (the projector of LLaVA "
        "and similar models). They are part of the result of training, and are neither analyzed "
        "nor written.",
    ),
    "whole-change": Code(
        "limit",
        "method",
        "If a method rescales the weight or subtracts a part of it, ΔW is the total change of the "
        "weight, computed from {base}.",
    ),
    "init-offset": Code(
        "limit", "method", "The product that {method} started from is subtracted: ΔW has rank 2r."
    ),
    "init-offset-in-weight": Code(
        "limit",
        "method",
        "The product that {method} started from is subtracted: ΔW has rank 2r. It began in "
        "directions of W, so that its enrichment and its energy in W's leading directions exceed "
        "the random baseline for that reason alone.",
    ),
    "config-not-written-with-weights": Code(
        "damage",
        "file",
        "{config} is not the one that {weights} was written with: rank, scale or targets may be "
        "those of another adapter. Restore the two files as they were written together, or write "
        "the adapter again.",
    ),
    "base-enlarged-entry": Code(
        "damage",
        "base weights",
        "{base}: {count} of {total} weights hold an entry more than 1000 times the rms of their "
        "others ({weights}; largest {value}, {ratio} times): a flipped bit or damaged bytes. Do "
        "not rely on results that involve them; download the file again.",
    ),
    "base-norm": Code(
        "damage",
        "base weights",
        "{base}: {count} of {total} weights have entries far from the size of trained ones "
        "({weights}; rms {rms}, linear layers have 0.001 to 5): scales that are missing or "
        "misread, bytes of another type, or a damaged file. Do not rely on results that involve "
        "them.",
    ),
    "base-hole": Code(
        "damage",
        "base weights",
        "{base}: {count} of {total} weights hold a long run of zeros ({weights}; longest {bytes} "
        "bytes, {share:.0%} of the weight): a hole in the file, or rows that were pruned or never "
        "trained. Find out which before you rely on results that involve them.",
    ),
    "base-zeros": Code(
        "damage",
        "base weights",
        "{base}: {count} of {total} weights hold more than 10 % zeros ({weights}; at most "
        "{share:.0%}), the others do not: a damaged file, or layers that were pruned.",
    ),
    "base-sparse": Code(
        "limit",
        "base weights",
        "{base} is a sparse model: {count} of {total} weights hold more than 10 % zeros (median "
        "{share:.0%}).",
    ),
    "base-transposed": Code(
        "damage",
        "base weights",
        "{base}: {count} matrices have the transposed shape of their update ({weights}), and no "
        "other has the shape of family '{family}' unless it is square: all weights seem to be "
        "transposed, square ones included. Do not rely on results for square ones; pass "
        "transposed=True (command line: --transposed) if that is intended.",
    ),
    "base-mixed-shards": Code(
        "damage",
        "base weights",
        "{base}: its shards store the same kind of tensor in two types ({tensor} is {dtype} in "
        "{file}, {other} is {other_dtype} in {other_file}): files of two models may be mixed.",
    ),
    "base-part": Code(
        "limit",
        "base weights",
        "{base} is shard {number} of {total} alone: modules of the other shards are not found. "
        "Pass the index or the folder of the whole model.",
    ),
    "run-note": Code("limit", "training", "{run}: {text}"),
    "run-retried": Code("limit", "training", "{run} failed and is tried again: {error}"),
    "label-misfit": Code(
        "limit",
        "labels",
        "the name does not match the label pattern {pattern}, so task and seed are those that the "
        "files state.",
    ),
    "labels-from-names": Code(
        "limit",
        "labels",
        "task and seed come from the name, by the pattern {pattern}. If names mean something else, "
        "pass a pattern of your own, or label='none' (command line: --label none).",
    ),
}
