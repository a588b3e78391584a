"""Adapters: LoRA, QLoRA and their variants, in loops that stay as they were.

`LoraRule` says what gets them. `qwix_train.attach` makes a `LoraTrainState`;
`LoraProvider` is for `apply_lora_to_model`; `init` and `split` give adapters, the base
and the layouts (`AdapterLayout`) as plain trees. `merge`, `merge_with_report` and
`unmerge` put them into the base and take them out (`Merged`, `MergeReport`,
`MergeRecord`).

Files: `save`, `restore`, `read_manifest` (an `AdapterManifest`); `save_peft`,
`load_peft`. `AdapterSet` holds several adapters of one base.
"""

from qwix_train.lora.adapter_set import AdapterSet as AdapterSet
from qwix_train.lora.checkpoint import read_manifest as read_manifest
from qwix_train.lora.checkpoint import restore as restore
from qwix_train.lora.checkpoint import save as save
from qwix_train.lora.layout import AdapterLayout as AdapterLayout
from qwix_train.lora.manifest import AdapterManifest as AdapterManifest
from qwix_train.lora.merge import Merged as Merged
from qwix_train.lora.merge import merge as merge
from qwix_train.lora.merge import merge_with_report as merge_with_report
from qwix_train.lora.merge import unmerge as unmerge
from qwix_train.lora.merge_report import MergeRecord as MergeRecord
from qwix_train.lora.merge_report import MergeReport as MergeReport
from qwix_train.lora.parts import split as split
from qwix_train.lora.peft import load_peft as load_peft
from qwix_train.lora.peft import save_peft as save_peft
from qwix_train.lora.provider import LoraProvider as LoraProvider
from qwix_train.lora.rules import LoraRule as LoraRule
from qwix_train.lora.train_state import LoraTrainState as LoraTrainState
from qwix_train.lora.train_state import init as init
