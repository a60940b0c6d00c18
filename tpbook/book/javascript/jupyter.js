// explorer.js as the module that anywidget wants: its source is the kernel, asked by message (Explorer.answer in widgets.py).
export default {
  render({ model, el }) {
    const view = Math.random(), waiting = new Map(); // answers go to every display of a widget
    let last = 0;
    function settle(reply) {
      waiting.get(reply.id)?.(reply);
      waiting.delete(reply.id);
    }
    const ask = (question, buffers) =>
      new Promise((resolve, reject) => {
        const id = `${view} ${++last}`;
        waiting.set(id, (reply) => (reply.error ? reject(new Error(reply.error)) : resolve(reply)));
        try {
          model.send({ id, ...question }, undefined, buffers);
        } catch {
          reject(new Error("The kernel does not answer: run the cell again."));
        }
      });
    const data = structuredClone(model.get("data"));
    const [{ grid, images }] = data.sets;
    model.on("msg:custom", settle);
    el.addEventListener("keydown", (event) => event.key.startsWith("Arrow") && event.stopPropagation()); // they would move to another cell
    window.tpbook.explorer(el, data, {
      ratios: () => data.ratios,
      blocks: true,
      compute: async ({ image, method, ratio, at }) =>
        window.tpbook.decode(await ask({ kind: "state", image: images[image].number, method, ratio, at }), grid[0] * grid[1]),
      upload: async (file) => {
        if (file.size > 9e6) throw new Error(`${file.name} has ${Math.ceil(file.size / 1e6)} MB, and Jupyter takes 9 in one message: give its path to explorer()`);
        return ask({ kind: "picture", name: file.name }, [await file.arrayBuffer()]);
      },
    });
    return () => model.off("msg:custom", settle);
  },
};
