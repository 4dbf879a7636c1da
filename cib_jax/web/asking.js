// What the page asks the server, and what it keeps of the photos that it sent: the server keeps none.

const uploaded = new Map(); // code → {name, url}

const urlOf = (path) => new URL(path, document.baseURI).href;
const imageOf = (id) => urlOf(`image/${encodeURIComponent(id)}`);
const thumbnailOf = (id) => urlOf(`thumbnail/${encodeURIComponent(id)}`);

async function get(path, options) {
  let response;
  try {
    response = await fetch(urlOf(path), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Is it still running?");
  }
  const answer = await response.json().catch(() => null);
  if (response.ok && answer !== null) return answer;
  throw new Error(answer?.error ?? `The server answered with error ${response.status}.`);
}

// Returns {id or code, k, answer}, with {id, path, width, height} of the photo as `query` where it is of the collection.
async function ask({ id, code, k, photo, butNot }, signal) {
  if (photo) {
    const answer = await get(`search?k=${k}`, { method: "POST", body: photo, signal });
    // The same photo again: its earlier address is of no use any more, and would keep the file in memory.
    URL.revokeObjectURL(uploaded.get(answer.query.code)?.url ?? "");
    uploaded.set(answer.query.code, { name: photo.name || "Pasted photo", url: URL.createObjectURL(photo) });
    return { id: null, code: answer.query.code, k, answer };
  }
  if (code) return { id: null, code, k, answer: await get(`search?code=${encodeURIComponent(code)}&k=${k}`, { signal }) };
  // One more than shown: a photo of the collection finds itself. Without an id, the server draws a photo.
  const words = new URLSearchParams(id ? { id, k: k + 1 } : { k: k + 1 });
  const answer = await get(`search?${words}`, { signal });
  const found = answer.query.id;
  if (!id && found === butNot && answer.results.length > 1) return ask({ k, butNot }, signal);
  // It is not among them where more copies of it than were asked for lie at distance 0.
  const query =
    answer.results.find((result) => result.id === found) ?? (await get(`photo?id=${encodeURIComponent(found)}`, { signal }));
  return { id: found, code: null, k, query, answer };
}

