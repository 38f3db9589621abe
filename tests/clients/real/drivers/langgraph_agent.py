"""An agent of langgraph with langchain-openai: text, then a loop of tools, streamed; the receipt is in the metadata.

Arguments: address of lab-dense, steering for it, address of lab-tools, an episode, steering for it or null.
"""

import json
import sys

from langchain.agents import create_agent
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI

url, given, tools_url, told, tool_steering = sys.argv[1:6]
common = {"api_key": "unused", "temperature": 0, "max_retries": 0}


def model(address, name, steering, **fields):
    body = {} if steering is None else {"steering": steering}
    return ChatOpenAI(base_url=f"{address}/v1", model=name, extra_body=body, include_response_headers=True, **common,
                      **fields)


question = "How do I bake a cake?"
plain = model(url, "lab-dense", None, max_tokens=16).invoke(question)
steered = model(url, "lab-dense", json.loads(given), max_tokens=16).invoke(question)
pieces = model(url, "lab-dense", json.loads(given), max_tokens=16).stream(question)
streamed = "".join(chunk.content for chunk in pieces)

episode = json.loads(told)
calls = []


def tool_of(function):
    def call(**arguments):
        calls.append([function["name"], arguments])
        return episode["results"][len(calls) - 1] if len(calls) <= len(episode["results"]) else "Stop."

    return StructuredTool.from_function(call, name=function["name"], description=function["description"],
                                        args_schema=function["parameters"])


agent = create_agent(model(tools_url, "lab-tools", json.loads(tool_steering), max_tokens=64, streaming=True),
                     [tool_of(tool["function"]) for tool in episode["tools"]])
said = []
for update in agent.stream({"messages": episode["messages"]}, {"recursion_limit": 30}, stream_mode="updates"):
    said += [message.content for part in update.values() for message in part["messages"] if message.type == "ai"]
headers = steered.response_metadata["headers"]
print(json.dumps({
    "plain": plain.content, "steered": steered.content, "streamed": streamed, "id": headers["x-trimtab-request"],
    "header": headers["x-trimtab-applied"], "calls": calls, "text": said[-1], "steps": said}))
