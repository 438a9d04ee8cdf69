// The network: loaded once, run once per image.

export class MissingPart extends Error {}

export class Network {
  constructor(ort, session, described) {
    this.ort = ort;
    this.session = session;
    this.described = described;
  }

  static async load() {
    if (typeof WebAssembly !== "object") {
      throw new MissingPart("This browser has no WebAssembly (or it is turned off), which the network needs.");
    }
    const described = await (await fetched("assets/network.json")).json();
    let ort;
    try {
      ort = await import("./runtime/ort.wasm.min.mjs");
    } catch {
      throw new MissingPart("ONNX Runtime Web is not beside this page: python docs/interactive/fetch_runtime.py fetches it.");
    }
    ort.env.wasm.numThreads = 1; // more would need headers that a plain file server does not send
    ort.env.wasm.wasmPaths = new URL("./runtime/", import.meta.url).href;
    const model = await (await fetched("assets/network.onnx")).arrayBuffer();
    const session = await ort.InferenceSession.create(new Uint8Array(model), { executionProviders: ["wasm"] });
    return new Network(ort, session, described);
  }

  /** Brightness (Float32Array, row-major) -> classes, and memberships and labels of every grouping. */
  async run(brightness) {
    const image = new this.ort.Tensor("float32", brightness, [1, 1, ...this.described.size]);
    const outputs = await this.session.run({ image });
    const stages = this.described.groupings.map((_, i) => i + 1);
    return {
      classes: outputs.classes.data,
      memberships: stages.map((k) => outputs[`memberships${k}`].data),
      labels: stages.map((k) => outputs[`labels${k}`].data),
    };
  }
}

async function fetched(path) {
  const response = await fetch(new URL(path, import.meta.url));
  if (!response.ok) throw new MissingPart(`${path} could not be read (${response.status}).`);
  return response;
}
