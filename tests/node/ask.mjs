// Greedy tokens of transformers.js: `node ask.mjs FOLDER REQUESTS`, where REQUESTS is a file of [{"image", "prompt"}].
// Prints a list of lists of new tokens. The folder is loaded as it is; of BLIP-2, which transformers.js does not know,
// the image tokens are written out here, and it is run as the `llava` that it is to a program with these three graphs.

import { readFileSync } from 'node:fs';
import {
  AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, RawImage, Tensor,
} from '@huggingface/transformers';

const [folder, requests] = process.argv.slice(2);
const config = JSON.parse(readFileSync(`${folder}/config.json`));

async function llava() {
  const model = await AutoModelForImageTextToText.from_pretrained(folder);
  const processor = await AutoProcessor.from_pretrained(folder);
  return [model, (image, prompt) => processor(image, prompt)];
}

async function blip2() {
  const model = await AutoModelForImageTextToText.from_pretrained(folder, { config: { ...config, model_type: 'llava' } });
  const [images, tokenizer] = [await AutoImageProcessor.from_pretrained(folder), await AutoTokenizer.from_pretrained(folder)];
  const places = Array(config.num_query_tokens).fill(BigInt(config.image_token_index));
  const row = (values) => new Tensor('int64', BigInt64Array.from(values), [1, values.length]);
  return [model, async (image, prompt) => {
    const ids = [...places, ...tokenizer.encode(prompt).map(BigInt)];
    return { input_ids: row(ids), attention_mask: row(ids.map(() => 1n)), ...await images(image) };
  }];
}

const [model, prepare] = await (config.model_type === 'blip-2' ? blip2() : llava());
const found = [];
for (const { image, prompt } of JSON.parse(readFileSync(requests))) {
  const inputs = await prepare(await RawImage.read(image), prompt);
  const output = await model.generate({ ...inputs, max_new_tokens: 20, do_sample: false });
  found.push(output.slice(null, [inputs.input_ids.dims[1], null]).tolist()[0].map(Number));
}
console.log(JSON.stringify(found));
