"""Asks a running page one thing by `gradio_client` and prints the answer as JSON; a process of its own, for its threads.

python ask_page.py URL API_NAME ARGUMENTS, these being JSON in which {"file": PATH} is uploaded.
"""

import json
import sys

from gradio_client import Client, handle_file

url, api_name, given = sys.argv[1:]
arguments = [handle_file(one["file"]) if isinstance(one, dict) else one for one in json.loads(given)]
print(json.dumps(Client(url, verbose=False, download_files=False).predict(*arguments, api_name=api_name)))
