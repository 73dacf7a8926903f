"""Tasks for the harness, of what the docstrings of Python's standard library say."""

import importlib
import inspect
import json

MODULES = ("bisect", "calendar", "colorsys", "fnmatch", "glob", "heapq", "shutil", "statistics", "string", "textwrap")  # fmt: skip

TASKS = {
    "functions": """
        output_type: multiple_choice
        doc_to_text: "In Python, the function {{name}} does this:"
        doc_to_choice: choices
        doc_to_target: gold
        metric_list: [{metric: acc}, {metric: acc_norm}]
        """,
    "docstrings": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
        """,
    "modules": """
        output_type: generate_until
        doc_to_text: "In one sentence, Python's module {{name}} is for"
        doc_to_target: "{{purpose}}"
        generation_kwargs: {until: [".", "\\n"], max_gen_toks: 16}
        metric_list: [{metric: exact_match}, {metric: chrf}, {metric: bleu}]
        """,
}


def write_tasks(folder, *, functions=32, texts=10):
    """Writes the tasks and their data into a folder; the names of the tasks."""
    said, docs = {}, []
    for module in map(importlib.import_module, MODULES):
        docs.append((module.__name__, " ".join((module.__doc__ or "").split())))
        for name, function in inspect.getmembers(module, inspect.isfunction):
            first = (inspect.getdoc(function) or "").split("\n")[0]
            if not name.startswith("_") and function.__module__ == module.__name__ and first:
                said[f"{module.__name__}.{name}"] = first
    docs = [(name, text) for name, text in docs if text][:texts]
    names = sorted(said)[:functions]
    rows = []
    for i, name in enumerate(names):
        # The right one and three others, in an order that turns.
        choices = [said[names[(i + k * 7) % len(names)]] for k in range(4)]
        gold = i % 4
        choices[0], choices[gold] = choices[gold], choices[0]
        rows.append({"name": name, "choices": choices, "gold": gold})
    texts = [{"text": text} for _, text in docs]
    purposes = [{"name": name, "purpose": text.split(".")[0]} for name, text in docs]
    data = {"functions": rows, "docstrings": texts, "modules": purposes}
    for task, description in TASKS.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data[task]))
        head = f"task: {task}\ndataset_path: json\ntest_split: train\n"
        file = f"dataset_kwargs: {{data_files: {folder / task}.jsonl}}\n"
        (folder / f"{task}.yaml").write_text(head + file + inspect.cleandoc(description) + "\n")
    return list(TASKS)
