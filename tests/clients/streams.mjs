// Streams with the openai client for Node: chat, completions, tools, responses, errors, an abort.
//
// Usage: streams.mjs FOLDER URL KEY, where `npm install openai` was run in FOLDER.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";

const [folder, url, key] = process.argv.slice(2);
const need = createRequire(join(resolve(folder), "package.json"));
const { OpenAI } = need("openai");
const { VERSION } = need("openai/version");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key });
const messages = [{ role: "user", content: "Once there was one." }];
const asked = { model: "tiny", messages, max_tokens: 20, seed: 3 };

async function chat() {
  const body = { ...asked, ignore_eos: true };
  const whole = await client.chat.completions.create(body);
  let text = "";
  let usage = null;
  const stream = await client.chat.completions.create({ ...body, stream: true, stream_options: { include_usage: true } });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual([usage.prompt_tokens, usage.completion_tokens], [whole.usage.prompt_tokens, whole.usage.completion_tokens]);
  const helped = await client.chat.completions.stream(body).finalContent();
  assert.equal(helped, text);
}

async function completions() {
  const prompts = { model: "tiny", prompt: ["Once", "There"], max_tokens: 6, seed: 1 };
  const whole = await client.completions.create(prompts);
  const texts = ["", ""];
  for await (const chunk of await client.completions.create({ ...prompts, stream: true })) {
    for (const choice of chunk.choices) texts[choice.index] += choice.text;
  }
  assert.deepEqual(texts, whole.choices.map((choice) => choice.text));
}

async function tools() {
  const parameters = { type: "object", properties: { city: { enum: ["Oslo", "Rome"] } }, required: ["city"], additionalProperties: false };
  const tool = { type: "function", function: { name: "book", parameters } };
  const stream = client.chat.completions.stream({ ...asked, max_tokens: 200, tools: [tool], tool_choice: { type: "function", function: { name: "book" } }, parallel_tool_calls: false });
  let deltas = 0;
  stream.on("tool_calls.function.arguments.delta", () => deltas++);
  const { choices } = await stream.finalChatCompletion();
  const [call] = choices[0].message.tool_calls;
  assert.equal(choices[0].finish_reason, "tool_calls");
  assert.ok(deltas > 0 && ["Oslo", "Rome"].includes(JSON.parse(call.function.arguments).city), call.function.arguments);
}

async function responses() {
  const stream = client.responses.stream({ model: "tiny", input: "Once there was one.", max_output_tokens: 20, temperature: 0 });
  let text = "";
  for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
  assert.equal(text, (await stream.finalResponse()).output_text);
}

async function errors() {
  await assert.rejects(client.chat.completions.create({ ...asked, model: "other", stream: true }), (error) => error instanceof OpenAI.NotFoundError);
  await assert.rejects(client.completions.create({ model: "tiny", prompt: "x", suffix: "y" }), (error) => error.param === "suffix");
}

async function aborted() {
  const stream = await client.completions.create({ model: "tiny", prompt: "Once", max_tokens: 200, stream: true, ignore_eos: true });
  for await (const chunk of stream) {
    assert.ok(chunk.choices);
    stream.controller.abort();
  }
  for (let look = 0; ; look++) {
    const text = await (await fetch(`${url}/metrics`, { headers: { authorization: `Bearer ${key}` } })).text();
    if (/^windlass:num_requests_running\{.*\} 0$/m.test(text) && /^windlass:kv_cache_blocks_used\{.*\} 0$/m.test(text)) break;
    assert.ok(look < 200, text);
    await new Promise((done) => setTimeout(done, 50));
  }
}

for (const check of [chat, completions, tools, responses, errors, aborted]) await check();
console.log(`streams: as the openai client ${VERSION} for Node has them`);
