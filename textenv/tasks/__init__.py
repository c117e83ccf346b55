"""Tasks on public data: where their rows come from, their environments and their gym ids.

Each file reads one data set, from a folder or by its name on the Hugging Face hub, and has the environment that
`gymnasium.make("textenv/<Name>-v0", data=..., tokenizer=...)` builds. The whole recipe of each, with its
figures, is the example of the same name.
"""
