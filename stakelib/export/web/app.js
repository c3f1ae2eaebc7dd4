// One scenario, one stakeholder, one answer, token by token. All text goes in with textContent: none of it is markup.
import { Wllama } from './wllama.js';

const part = (id) => document.getElementById(id);
const say = (text) => { part('status').textContent = text; };
const about = await (await fetch('prompts.json')).json();
let model = null, halt = null;

const fill = (list, names) => list.replaceChildren(...names.map((name) => new Option(name, name)));
const chosen = () => about.scenarios[part('scenario').selectedIndex].prompts[part('stakeholder').value];
const show = () => { part('prompt').textContent = chosen().text; };

async function load() {
  say('Loading the model ...');
  const wllama = new Wllama({ default: './wllama.wasm' }, { suppressNativeLog: true });
  wllama.setCompat(null); // its default fetches another build from the internet in some browsers
  const pieces = [];
  for (const name of about.files) {
    const reply = await fetch(name);
    if (!reply.ok) throw new Error(`${name}: ${reply.status}`);
    pieces.push(await reply.blob());
  }
  await wllama.loadModel(pieces, { n_ctx: 2048, n_parallel: 1 });
  return wllama;
}

async function ask() {
  part('ask').disabled = true;
  part('answer').textContent = '';
  const start = performance.now();
  let tokens = 0;
  try {
    model ??= await load();
    halt = new AbortController();
    part('stop').disabled = false;
    say('Answering ...');
    // the text around the prompt is that of training, made by the course
    const wanted = { prompt: chosen().whole, max_tokens: about.tokens, temperature: 0, stream: true };
    for await (const chunk of await model.createCompletion({ ...wanted, abortSignal: halt.signal })) {
      part('answer').textContent += chunk.choices[0]?.text ?? '';
      tokens += 1;
    }
    say(`Done: ${tokens} tokens in ${((performance.now() - start) / 1000).toFixed(1)} s, ${model.getNumThreads()} thread(s).`);
  } catch (problem) {
    if (problem.name === 'AbortError') {
      say('Stopped.');
    } else { // WebAssembly that failed once (out of memory, after sleep) answers no more: the next question loads it anew
      model?.exit().catch(() => {});
      model = null;
      say(`It did not work: ${problem.message}. Press Ask to load the model again.`);
    }
  }
  part('stop').disabled = true;
  part('ask').disabled = false;
}

fill(part('scenario'), about.scenarios.map((scenario) => scenario.name));
fill(part('stakeholder'), Object.keys(about.scenarios[0].prompts));
part('scenario').addEventListener('change', show);
part('stakeholder').addEventListener('change', show);
part('ask').addEventListener('click', ask);
part('stop').addEventListener('click', () => halt?.abort());
show();
part('ask').disabled = false;
say(`Ready: ${about.name}. The first answer waits for the model to load.`);
