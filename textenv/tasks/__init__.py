"""Environments of known tasks, each with a gym id: four on data sets, two synthetic ones and the demo.

A task's module reads its data set, from a folder or by name from the Hugging Face hub, and defines the environment that
`gymnasium.make("textenv/<Name>-v0", data=..., tokenizer=...)` builds. The examples have the complete recipes and their
figures.
"""
