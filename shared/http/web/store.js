// The history's place in the browser (IndexedDB): one record a request, with its pictures and its inputs.

const NAME = "multigpu-diffusion";
const RECORDS = "requests";

let database = null; // a promise; it fails where the browser keeps nothing

function open() {
  database ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(RECORDS, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = request.onblocked = () => reject(request.error);
  });
  return database;
}

async function act(mode, deed) {
  const transaction = (await open()).transaction(RECORDS, mode);
  const request = deed(transaction.objectStore(RECORDS));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error ?? request.error);
  });
}

export const readAll = () => act("readonly", (records) => records.getAll());
export const write = (record) => act("readwrite", (records) => records.put(record));
export const remove = (id) => act("readwrite", (records) => records.delete(id));
export const removeAll = () => act("readwrite", (records) => records.clear());
