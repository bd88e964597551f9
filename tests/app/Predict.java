import java.io.ByteArrayInputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.CompletableFuture;

/** Sends each file to a URL: in turn, with a length and chunked, and all of them at once. Prints each answer. */
public class Predict {
    public static void main(String[] args) throws Exception {
        URI url = URI.create(args[0]);
        HttpClient client = HttpClient.newHttpClient(); // prefers HTTP/2, so it offers to upgrade with every request
        for (int round = 0; round < 3; round++) {
            for (int i = 1; i < args.length; i++) {
                byte[] content = Files.readAllBytes(Path.of(args[i]));
                print("length", args[i], client.send(post(url, BodyPublishers.ofByteArray(content)), BodyHandlers.ofString()));
                BodyPublisher chunked = BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(content));
                print("chunked", args[i], client.send(post(url, chunked), BodyHandlers.ofString()));
            }
        }
        List<CompletableFuture<HttpResponse<String>>> answers = new ArrayList<>();
        for (int round = 0; round < 3; round++) {
            for (int i = 1; i < args.length; i++) {
                answers.add(client.sendAsync(post(url, BodyPublishers.ofFile(Path.of(args[i]))), BodyHandlers.ofString()));
            }
        }
        for (int i = 0; i < answers.size(); i++) {
            print("concurrent", args[1 + i % (args.length - 1)], answers.get(i).get());
        }
    }

    private static HttpRequest post(URI url, BodyPublisher body) {
        return HttpRequest.newBuilder(url).header("Content-Type", "application/octet-stream").POST(body).build();
    }

    private static void print(String how, String file, HttpResponse<String> answer) {
        System.out.println(String.join("\t", how, file, answer.version().toString(), answer.body()));
    }
}
